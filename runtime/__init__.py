"""Engines and a prompt to video, in a call, a command or a server."""
