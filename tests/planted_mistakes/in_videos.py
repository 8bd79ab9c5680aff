"""In what is done with videos once they are sampled."""

from __future__ import annotations

from tests.planted_mistakes.mistake import Mistake

_WRITER = "tests/runtime/test_video_writer.py"

IN_VIDEOS = (
    Mistake(
        "all videos are decoded before the first file is encoded",
        "runtime/components.py",
        "self._family.decode(pipeline, latents.to(device), workload, **options)",
        "[*self._family.decode(pipeline, latents.to(device), workload, **options)]",
        (f"{_WRITER}::test_a_file_is_written_before_the_next_video_is_decoded",),
    ),
    Mistake(
        "an interrupt waits for the file",
        "runtime/video_writer.py",
        "        self._stop.set()\n",
        "",
        (f"{_WRITER}::test_whoever_leaves_early_keeps_whole_files_alone",),
    ),
    Mistake(
        "each video is shown with the first one's sound",
        "runtime/callbacks.py",
        "audio[index : index + 1]",
        "audio[:1]",
        (f"{_WRITER}::test_each_video_is_shown_with_its_sound",),
    ),
    Mistake(
        "a callback's time is decoding",
        "runtime/components.py",
        "                    with self._clock.stage(None):\n                        on_video(videos[-1])",
        "                    on_video(videos[-1])",
        ("tests/runtime/test_video_stream.py::test_what_is_done_with_a_video_is_no_stage",),
    ),
)
