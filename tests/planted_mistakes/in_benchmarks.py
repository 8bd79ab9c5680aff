"""In benchmarks/ and examples/."""

from __future__ import annotations

from tests.planted_mistakes.mistake import Mistake

_CLOCK = "tests/benchmarks/test_clock.py"
_VERIFY = "tests/benchmarks/test_verify.py"
_SHAPES = "tests/examples/test_moving_shapes.py"
_DEMO = "tests/examples/test_demo.py"
_MUON = "tests/examples/test_muon.py"

IN_BENCHMARKS = (
    Mistake(
        "the last warm-up is counted",
        "benchmarks/clock.py",
        "        if i >= WARMUPS:\n",
        "        if i >= WARMUPS - 1:\n",
        (f"{_CLOCK}::test_works_take_turns",),
    ),
    Mistake(
        "what resets the work is timed",
        "benchmarks/clock.py",
        "        work.reset()\n        start, host_start = record_event(device), time.perf_counter()\n",
        "        start, host_start = record_event(device), time.perf_counter()\n        work.reset()\n",
        (f"{_CLOCK}::test_a_reset_is_not_timed",),
    ),
    Mistake(
        "a skip row that moves the other way passes",
        "benchmarks/verify.py",
        'if not doubts and "skip" in preds and not self._moved_alike(preds):',
        'if "skip" not in preds:',
        (f"{_VERIFY}::test_a_wrong_step_below_the_rounding_is_doubted",),
    ),
    Mistake(
        "a perturbed model is not put back",
        "benchmarks/eager_step.py",
        '            vars(block).pop("forward", None)\n',
        "",
        ("tests/benchmarks/test_eager_step.py::test_rows_equal_passes_of_their_own",),
    ),
    Mistake(
        "video tokens of the skip row see each other",
        "benchmarks/diffusers_models.py",
        "own.copy_(torch.eye(len(own), dtype=torch.bool, device=query.device))",
        "own.fill_(True)",
        ("tests/benchmarks/test_eager_step.py::test_rows_equal_passes_of_their_own",),
    ),
    Mistake(
        "a result is written in place",
        "benchmarks/record.py",
        'write_atomically(self._path, (json.dumps(self.result, indent=1) + "\\n").encode())',
        'json.dump(self.result, self._path.open("w"))',
        ("tests/benchmarks/test_record.py::test_grows_and_is_whole_every_time",),
    ),
    Mistake(
        "percentiles are in seconds",
        "benchmarks/record.py",
        "np.asarray(seconds) * 1e3",
        "np.asarray(seconds)",
        ("tests/benchmarks/test_record.py::test_percentiles_are_milliseconds",),
    ),
    Mistake(
        "a wrong kernel is trusted",
        "benchmarks/kernels.py",
        "                if not case.error <= _MAX_RELATIVE\n",
        "                if case.error < 0\n",
        ("tests/benchmarks/test_kernels.py::test_a_wrong_kernel_is_timed_but_not_trusted",),
    ),
    Mistake(
        "latents that are off are trusted",
        "benchmarks/sample.py",
        "    if not error <= limit < math.inf:\n",
        "    if error < 0:\n",
        ("tests/benchmarks/test_sample.py::test_a_broken_plan_is_timed_but_not_trusted",),
    ),
    Mistake(
        "a wrong step is trusted",
        "benchmarks/step.py",
        "results.distrust(doubt for verdict in verdicts.values() for doubt in verdict.doubts)",
        "results.distrust(())",
        ("tests/benchmarks/test_step.py::test_a_broken_plan_is_timed_but_not_trusted",),
    ),
    Mistake(
        "a missed goal is told as met",
        "benchmarks/goals.py",
        "value <= self.bound if self.at_most else value >= self.bound",
        "value >= self.bound if self.at_most else value <= self.bound",
        ("tests/benchmarks/test_report.py::test_tables_goals_and_plot",),
    ),
    Mistake(
        "waits of the host are not counted",
        "benchmarks/launches.py",
        r"(\w+Synchronize|Memcpy",
        r"(\w+Synchronise|Memcpy",
        ("tests/benchmarks/test_launches.py::test_counts_the_calls_of_the_run",),
    ),
    Mistake(
        "a part's children live on",
        "benchmarks/part_process.py",
        "for signum in (signal.SIGINT, signal.SIGKILL):",
        "for signum in (signal.SIGINT,):",
        ("tests/benchmarks/test_gpu.py::test_a_part_takes_its_children_with_it",),
    ),
    Mistake(
        "a failed part is told as done",
        "benchmarks/part_process.py",
        'ended = "done" if status == 0 else',
        'ended = "done" if status >= 0 else',
        ("tests/benchmarks/test_gpu.py::test_a_failure_and_a_cut_do_not_stop_the_others",),
    ),
    Mistake(
        "up and down are swapped",
        "examples/moving_shapes/measure.py",
        "step[axis] = int(np.sign(move[axis]))",
        "step[axis] = int(np.sign(move[axis])) * (1 - 2 * axis)",
        (f"{_SHAPES}::test_measure_reads_the_generators_clips",),
    ),
    Mistake(
        "a shape may leave the picture",
        "examples/moving_shapes/clips.py",
        "slack = SIZE // 2 - radius - 1 - path.max(axis=0)",
        "slack = SIZE // 2 + path.max(axis=0)",
        (f"{_SHAPES}::test_measure_reads_the_generators_clips",),
    ),
    Mistake(
        "a picture is encoded with noise",
        "examples/moving_shapes/linear_start.py",
        "    conv_out.bias[-1] = LOG_VARIANCE\n",
        "",
        (f"{_SHAPES}::test_a_picture_is_encoded_without_noise_before_training",),
    ),
    Mistake(
        "a clip does not begin with its picture",
        "examples/moving_shapes/settings.py",
        "image=[as_image(picture) for picture in pictures] or None,",
        "image=None,",
        (f"{_SHAPES}::test_clips_begin_with_the_pictures_that_are_given",),
    ),
    Mistake(
        "a picture gives its direction away",
        "examples/moving_shapes/clips.py",
        "centre = SIZE // 2 + rng.integers(-OFF_CENTRE, OFF_CENTRE + 1, size=(1, 2))",
        "centre = SIZE // 2 + rng.integers(-3 * OFF_CENTRE, 3 * OFF_CENTRE + 1, size=(1, 2))",
        (f"{_SHAPES}::test_a_shape_in_a_picture_can_move_in_any_direction",),
    ),
    Mistake(
        "words attend to padding",
        "examples/moving_shapes/models.py",
        "    hide_padding(encoder)\n",
        "",
        (f"{_SHAPES}::test_padding_changes_nothing_in_an_untrained_text_encoder",),
    ),
    Mistake(
        "steps of the training grow with the smaller size of a matrix",
        "examples/moving_shapes/muon.py",
        'size = group["lr"] * 0.2 * max(shape) ** 0.5',
        'size = group["lr"] * 0.2 * min(shape) ** 0.5',
        (f"{_MUON}::test_a_few_steps_are_those_of_torch_up_to_bfloat16",),
    ),
    Mistake(
        "another checkpoint is shown with the figures of this one",
        "examples/moving_shapes/results.py",
        'return report if report["checkpoint_sha256"] == measured else None',
        "return report",
        (f"{_DEMO}::test_another_checkpoint_has_no_figures",),
    ),
)
