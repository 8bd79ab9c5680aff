"""In build_engines/."""

from __future__ import annotations

from tests.planted_mistakes.mistake import Mistake

_INDUCTOR = "tests/build_engines/test_compile_inductor.py"
_BLOCKS = "tests/build_engines/test_inductor_blocks.py"
_JOINED = "tests/build_engines/test_joined_graph.py"
_VERIFY = "tests/build_engines/test_verify.py"
_TENSORRT = "tests/build_engines/test_compile_tensorrt.py"

IN_BUILD_ENGINES = (
    Mistake(
        "a lock file that was removed is taken for the lock",
        "build_engines/build_folder.py",
        "if os.path.samestat(os.fstat(named.fileno()), path.stat()):",
        "if named.fileno() >= 0:",
        (
            "tests/build_engines/test_build_folder.py"
            "::test_a_lock_file_that_another_builder_has_removed_is_not_the_lock",
        ),
    ),
    Mistake(
        "the build imports the runtime",
        "build_engines/progress.py",
        "from typing import Protocol",
        "from typing import Protocol\n\nfrom stg_trt.runtime.noise import draw as draw",
        ("tests/test_architecture.py::test_parts_import_only_what_they_may",),
    ),
    Mistake(
        "a folder in which nothing was built stays",
        "build_engines/build_folder.py",
        "                folder.rmdir()\n",
        "                pass\n",
        ("tests/build_engines/test_build_folder.py::test_a_failure_leaves_no_folder",),
    ),
    Mistake(
        "a damaged segment is kept",
        "build_engines/build.py",
        "            except EngineRejected:\n                continue\n            kept",
        "            except EngineRejected:\n                pass\n            kept",
        ("tests/cli/test_engine_folder.py::test_building_again_repairs",),
    ),
    Mistake(
        "the key has the profile of one row",
        "build_engines/build.py",
        "profiles=self.compiler.profiles(segment),",
        "profiles=((1, 1, 1),),",
        (f"{_TENSORRT}::test_manifests_say_all_and_files_are_what_they_say",),
    ),
    Mistake(
        "the profile has no rows for the skip pass",
        "build_engines/options.py",
        "return 1, passes * self.max_batch, self._most_passes * self.max_batch",
        "return 1, passes * self.max_batch, 2 * self.max_batch",
        (f"{_TENSORRT}::test_manifests_say_all_and_files_are_what_they_say",),
    ),
    Mistake(
        "an attention that is not fused passes",
        "build_engines/segment_build.py",
        "if compiled.fused_attentions not in (None, wanted):",
        "if compiled.fused_attentions not in (None, *range(wanted + 1)):",
        (f"{_INDUCTOR}::test_an_attention_that_is_not_fused_misses_its_gate",),
    ),
    Mistake(
        "not-a-number passes the numerics gate",
        "build_engines/compiler.py",
        "return found.relative_l2 <= self.relative_l2 and found.cosine >= self.cosine",
        "return not (found.relative_l2 > self.relative_l2 or found.cosine < self.cosine)",
        (f"{_VERIFY}::test_one_wrong_output_at_one_timestep_is_caught",),
    ),
    Mistake(
        "the first output is compared only",
        "build_engines/verify.py",
        "zip(wanted, got, strict=True)),",
        "[*zip(wanted, got, strict=True)][:1]),",
        (f"{_VERIFY}::test_one_wrong_output_at_one_timestep_is_caught",),
    ),
    Mistake(
        "no row skips its attention when a segment is verified",
        "build_engines/reference.py",
        "torch.arange(rows) != rows - 1",
        "torch.arange(rows) >= 0",
        (f"{_VERIFY}::test_the_reference_feeds_each_segment_what_those_before_it_made",),
    ),
    Mistake(
        "the last timestep is never verified",
        "build_engines/reference.py",
        "    last = len(values) - 1\n",
        "    last = len(values) - 2\n",
        (f"{_VERIFY}::test_timesteps_are_first_middle_and_last",),
    ),
    Mistake(
        "a frozen number of rows passes",
        "build_engines/export.py",
        "isinstance(dim, int) if isinstance(wanted, str) else dim != wanted",
        "not isinstance(wanted, str) and dim != wanted",
        ("tests/build_engines/test_export.py::test_frozen_rows_are_named",),
    ),
    Mistake(
        "a frozen number of rows is not noticed for one video",
        "build_engines/dynamic_rows.py",
        "    most = max(max_rows, _TRACED_ROWS + 1)",
        "    most = max(max_rows, _TRACED_ROWS)",
        (f"{_INDUCTOR}::test_frozen_rows_are_named",),
    ),
    Mistake(
        "packages for other numbers of rows are taken for the same",
        "build_engines/trace.py",
        "{shapes}{program.range_constraints}",
        "{shapes}",
        (f"{_INDUCTOR}::test_pieces_trace_equally_where_only_their_weights_differ",),
    ),
    Mistake(
        "weights that are made while it runs stay in the package",
        "build_engines/trace.py",
        "    if program.constants:\n",
        "    if program.constants is None:\n",
        (f"{_INDUCTOR}::test_a_tensor_made_while_it_runs_is_refused",),
    ),
    Mistake(
        "masks are not expanded for ONNX Runtime",
        "build_engines/float32_graph.py",
        "    _expand_masks(graph)\n",
        "",
        ("tests/build_engines/test_float32_graph.py::test_the_graph_is_otherwise_the_same",),
    ),
    Mistake(
        "the plugin's node turns the other way",
        "build_engines/plugin_nodes.py",
        "first = Sub (a_cos, b_sin)",
        "first = Add (a_cos, b_sin)",
        ("tests/build_engines/test_plugin_nodes.py::test_one_node_per_block_computes_the_same",),
    ),
    Mistake(
        "a damaged package of another build is taken over",
        "build_engines/reusable_files.py",
        "                check_file(path, record)\n",
        "",
        (f"{_INDUCTOR}::test_a_finished_package_is_taken_over_only_whole",),
    ),
    Mistake(
        "weights become part of the code",
        "build_engines/aoti_package.py",
        '"always_keep_tensor_constants": True',
        '"always_keep_tensor_constants": False',
        (f"{_BLOCKS}::test_no_weight_becomes_part_of_a_package",),
    ),
    Mistake(
        "a rotation the other way is fused too",
        "build_engines/onnxruntime_graph.py",
        " or others != [(b, cos), (a, sin)]",
        "",
        ("tests/build_engines/test_onnxruntime_graph.py::test_other_joins_are_kept",),
    ),
    Mistake(
        "the GELU of another formula is folded",
        "build_engines/gelu_epilogue.py",
        'gelu.target == aten.gelu.default and gelu.kwargs.get("approximate") == "tanh"',
        "gelu.target == aten.gelu.default",
        ("tests/build_engines/test_gelu_epilogue.py::test_other_products_are_kept",),
    ),
    Mistake(
        "an attention kernel that refused is tried again",
        "build_engines/compile_inductor.py",
        "self._attention[target] = tuple(others)",
        "self._attention[target] = (refused, *others)[:len(others)]",
        (f"{_INDUCTOR}::test_the_next_attention_kernel_takes_the_place_of_one_that_refuses",),
    ),
    Mistake(
        "a failed compilation leaves its cache",
        "build_engines/aoti_package.py",
        "fresh_cache(dir=str(path.parent)), toolkit:",
        "fresh_cache(dir=str(path.parent), delete=False), toolkit:",
        (f"{_INDUCTOR}::test_what_inductor_refuses_is_told_in_one_line",),
    ),
    Mistake(
        "a cancelled compilation is told as a failed one",
        "build_engines/compile_tensorrt.py",
        "        if cancel.is_set():\n            raise Cancelled\n",
        "",
        (f"{_TENSORRT}::test_an_event_cancels_the_compiler",),
    ),
    Mistake(
        "bfloat16 is held to float32's tolerance",
        "build_engines/compiler.py",
        "BFLOAT16 = Tolerance(3e-2, 1 - 1e-3)",
        "BFLOAT16 = Tolerance(1e-4, 1 - 1e-6)",
        (f"{_BLOCKS}::test_bfloat16_is_within_its_own_tolerance",),
    ),
    Mistake(
        "segments are told as built that were not",
        "build_engines/display.py",
        "        if reused:\n",
        "        if not reused:\n",
        ("tests/cli/test_engine_folder.py::test_building_again_repairs",),
    ),
    Mistake(
        "a grid of tokens stays between two pieces",
        "build_engines/joined_graph.py",
        "source is not None and source.shape == result.shape",
        "source is None and source.shape == result.shape",
        (f"{_JOINED}::test_a_segment_is_joined_from_kinds_of_pieces[blocks alone]",),
    ),
    Mistake(
        "a segment is built without its last block",
        "build_engines/pieces.py",
        "_block(segment, block) for block in segment.blocks if",
        "_block(segment, block) for block in segment.blocks[:-1] if",
        ("tests/build_engines/test_whole_export.py::test_joined_pieces_are_the_whole_segment[ltx]",),
    ),
    Mistake(
        "weights do not begin with a page of their file",
        "build_engines/graph_weights.py",
        "file.write(bytes(-file.tell() % _ALIGNMENT))",
        "file.write(bytes(file.tell() % _ALIGNMENT))",
        ("tests/build_engines/test_graph_weights.py::test_every_weight_is_what_it_was[5000]",),
    ),
    Mistake(
        "a block is loaded with embedding and head",
        "stg_trt/models/checkpoint.py",
        "*([None] if ends else [])",
        "None",
        ("tests/models/test_checkpoint.py::test_only_the_asked_blocks_take_memory[False-False]",),
    ),
    Mistake(
        "the nearest piece of a segment is recorded",
        "build_engines/verify.py",
        "        max(at_timestep, key=lambda found: found.relative_l2) for",
        "        min(at_timestep, key=lambda found: found.relative_l2) for",
        ("tests/build_engines/test_segment_build.py::test_of_all_pieces_the_farthest_is_recorded",),
    ),
    Mistake(
        "what all blocks read is loaded with embedding and head alone",
        "stg_trt/models/checkpoint.py",
        "if n in shared or family.block_of(n) in wanted",
        "if family.block_of(n) in wanted",
        (
            "tests/build_engines/test_whole_export.py::test_a_block_needs_the_weights_of_no_other_piece[mochi]",
        ),
    ),
    Mistake(
        "an engine needs disk for one target alone",
        "build_engines/machine_needs.py",
        "self._engine_bytes(segment) * targets for",
        "self._engine_bytes(segment) for",
        (
            "tests/build_engines/test_machine_needs.py::test_engines_take_the_disk_and_the_largest_of_them_the_memory",
        ),
    ),
    Mistake(
        "finished segments need disk again",
        "build_engines/build.py",
        "for segment, keys in missing.items() if keys}).check()",
        "for segment, keys in missing.items()}).check()",
        ("tests/build_engines/test_machine_needs.py::test_only_what_is_missing_counts",),
    ),
    Mistake(
        "segments that another build has come before the others",
        "build_engines/build.py",
        "sorted((*others, record), key=lambda finished: names.index(finished.segment.name))",
        "(*others, record)",
        ("tests/benchmarks/test_build.py::test_records_every_mode_and_fills_the_table",),
    ),
)
