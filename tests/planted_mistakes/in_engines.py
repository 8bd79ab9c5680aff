"""In stg_trt/engines, stg_trt/system and stg_trt/cli."""

from __future__ import annotations

from tests.planted_mistakes.mistake import Mistake

_KEY = "tests/engines/test_key.py"
_MANIFEST = "tests/engines/test_manifest.py"
_STORE = "tests/engines/test_store.py"
_TENSORRT = "tests/engines/test_tensorrt.py"
_INDUCTOR = "tests/engines/test_inductor.py"

IN_ENGINES = (
    Mistake(
        "engines of another LoRA are run",
        "stg_trt/engines/store.py",
        "if self.lora is not None and self.lora != manifest.lora:",
        "if self.lora is not None and not manifest.weights:",
        ("tests/build_engines/test_lora_build.py::test_only_changed_segments_are_compiled",),
    ),
    Mistake(
        "the hash of a file that has just changed is kept",
        "stg_trt/system/kept_hashes.py",
        "if settled and _entry",
        "if _entry",
        ("tests/system/test_kept_hashes.py::test_a_hash_of_a_file_that_has_just_changed_is_not_kept",),
    ),
    Mistake(
        "the key leaves the rows of the profile out",
        "stg_trt/engines/key.py",
        "json.loads(json.dumps(asdict(self)))\n",
        'json.loads(json.dumps(asdict(self)))\n        facts.pop("rows")\n',
        (f"{_KEY}::test_the_key_changes_with_every_fact",),
    ),
    Mistake(
        "engines of other graphs are run",
        "stg_trt/engines/store.py",
        "if manifest.export_version == now:",
        "if manifest.export_version <= now:",
        (f"{_STORE}::test_engines_of_other_graphs_are_refused",),
    ),
    Mistake(
        "an edited manifest is read",
        "stg_trt/engines/manifest.py",
        "if digest != _digest(body):",
        "if digest is None:",
        (f"{_MANIFEST}::test_the_digest_detects_an_edit",),
    ),
    Mistake(
        "a manifest of another schema is read",
        "stg_trt/engines/manifest.py",
        'body.get("schema_version") != SCHEMA_VERSION:',
        '"schema_version" not in body:',
        (f"{_MANIFEST}::test_another_version_is_refused",),
    ),
    Mistake(
        "a manifest is written in place",
        "stg_trt/engines/manifest.py",
        "write_atomically(folder / FILE_NAME, text.encode())",
        "(folder / FILE_NAME).write_text(text)",
        (f"{_MANIFEST}::test_a_write_that_fails_leaves_the_old_file",),
    ),
    Mistake(
        "a changed engine file of the same length is loaded",
        "stg_trt/engines/store.py",
        "if kept_sha256(path, whole=whole) != record.sha256:",
        "if not record.sha256:",
        (f"{_STORE}::test_engine_files_are_checked",),
    ),
    Mistake(
        "an unfinished build is used",
        "stg_trt/engines/store.py",
        "if not manifest.complete:",
        "if not manifest.backend:",
        (f"{_STORE}::test_an_unfinished_build_is_not_used",),
    ),
    Mistake(
        "engines for two videos are refused for two videos",
        "stg_trt/engines/store.py",
        "if self.videos > manifest.max_batch:",
        "if self.videos >= manifest.max_batch:",
        (f"{_STORE}::test_a_build_that_fits",),
    ),
    Mistake(
        "engines of other weights are used",
        "stg_trt/engines/store.py",
        "if self.weights is not None and self.weights != manifest.weights:",
        "if self.weights is not None and not manifest.weights:",
        (f"{_STORE}::test_every_rejection_says_what_to_rebuild",),
    ),
    Mistake(
        "engines of the CPU come before those of the GPU",
        "stg_trt/engines/store.py",
        'return _device(manifest) == "cpu", backends()',
        'return _device(manifest) != "cpu", backends()',
        (f"{_STORE}::test_a_machine_is_given_what_it_can_run",),
    ),
    Mistake(
        "one of the perturbed blocks is enough",
        "stg_trt/engines/store.py",
        "if not set(perturbation.blocks) <= set(built.blocks):",
        "if not set(perturbation.blocks) & set(built.blocks):",
        (f"{_STORE}::test_every_rejection_says_what_to_rebuild",),
    ),
    Mistake(
        "TensorRT is chosen for a GPU that is too old",
        "stg_trt/engines/auto_backend.py",
        '.removeprefix("sm_")) < _OLDEST_SM:',
        '.removeprefix("sm_")) < 0:',
        ("tests/engines/test_auto_backend.py::test_choice",),
    ),
    Mistake(
        "any precision is taken",
        "stg_trt/engines/backends.py",
        "if precision not in precisions:",
        "if not precisions:",
        ("tests/cli/test_errors.py::test_build_arguments[precision of another backend]",),
    ),
    Mistake(
        "CUDA_HOME is not put back",
        "stg_trt/engines/cuda_toolkit.py",
        "            cpp_extension.CUDA_HOME = home\n",
        "",
        ("tests/engines/test_cuda_toolkit.py::test_torch_builds_with_the_toolkit_that_was_found",),
    ),
    Mistake(
        "what enqueue answers is ignored",
        "stg_trt/engines/tensorrt.py",
        "        if not self._context.execute_async_v3(stream):\n",
        "        if self._context.execute_async_v3(stream) is None:\n",
        (f"{_TENSORRT}::test_every_failing_call_is_noticed",),
    ),
    Mistake(
        "engines of two contexts do not share their memory's size",
        "stg_trt/engines/tensorrt.py",
        "Arena(max(engine.activation_bytes",
        "Arena(min(engine.activation_bytes",
        (f"{_TENSORRT}::test_one_graph_per_guidance_state",),
    ),
    Mistake(
        "compiled kernels are not kept",
        "stg_trt/engines/tensorrt.py",
        "            write_atomically(self._path, compiled)\n",
        "            pass\n",
        (f"{_TENSORRT}::test_rtx_keeps_what_it_compiled",),
    ),
    Mistake(
        "packages of another torch are loaded",
        "stg_trt/engines/inductor_chain.py",
        "if chain.torch != torch.__version__:",
        "if not chain.torch:",
        (f"{_INDUCTOR}::test_another_torch_or_machine",),
    ),
    Mistake(
        "more rows than were compiled for are taken",
        "stg_trt/engines/inductor.py",
        "> self._engine.chain.max_rows:",
        "> 2 * self._engine.chain.max_rows:",
        (f"{_INDUCTOR}::test_tensors_that_do_not_fit",),
    ),
    Mistake(
        "a chain reads and writes the same memory",
        "stg_trt/engines/inductor.py",
        "                side[name] += 1\n",
        "",
        (f"{_INDUCTOR}::test_what_crosses_pieces_lies_in_two_sides_of_one_memory",),
    ),
    Mistake(
        "a failed write leaves its temporary file",
        "stg_trt/system/files.py",
        "        temporary.unlink(missing_ok=True)\n",
        "        pass\n",
        (f"{_MANIFEST}::test_a_write_that_fails_leaves_the_old_file",),
    ),
    Mistake(
        "what is below the engines imports them",
        "stg_trt/system/versions.py",
        "from importlib.metadata import",
        "import stg_trt.engines.key\nfrom importlib.metadata import",
        ("tests/test_architecture.py::test_parts_import_only_what_they_may",),
    ),
    Mistake(
        "an interrupt is swallowed",
        "stg_trt/system/interruptible.py",
        "        _wait_for(future)\n        raise\n",
        "        _wait_for(future)\n",
        ("tests/system/test_interruptible.py::test_an_interrupt_stops_the_call_and_waits_for_it",),
    ),
    Mistake(
        "an error ends the program with status 0",
        "stg_trt/cli/main.py",
        "    sys.exit(1)\n",
        "    sys.exit(0)\n",
        ("tests/cli/test_main.py::test_mistakes_before_a_command",),
    ),
    Mistake(
        "ONNX Runtime's want of memory is told as a defect",
        "stg_trt/errors.py",
        "|failed to allocate",
        "",
        ("tests/cli/test_main.py::test_out_of_memory",),
    ),
    Mistake(
        "all passes in full cost what the shared ones do",
        "stg_trt/cli/inspect.py",
        "len(passes) * sum(map(flops, whole))",
        "plan.flops(flops)",
        ("tests/test_goldens.py::test_inspect_shows_the_states_that_the_model_is_used_in[segmented-ltx]",),
    ),
    Mistake(
        "the doctor says that inductor builds for a GPU that is not there",
        "stg_trt/cli/doctor.py",
        'return "yes" if reason is None else f"for the CPU only',
        'return "yes" if reason is not None else f"for the CPU only',
        (f"{_INDUCTOR}::test_the_doctor_tells_what_inductor_can",),
    ),
)
