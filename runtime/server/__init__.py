"""An HTTP server over engines, under the names of OpenAI's video API."""
