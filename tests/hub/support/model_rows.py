"""What happens to a model in training, casts, checkpoints and compilers: rows of docs/reliability.md.

`id` is the test that shows it, as FILE::TEST below `tests/`; empty where it was measured once.
"""

from hub_tables import Row

_ONCE = ' (measured once, torch 2.14.1, AMD EPYC with bfloat16 arithmetic)'

MODELS = [
    Row(
        'layers/test_gate.py::test_bfloat16_gradients_of_few_rows_hold_nothing_that_was_left_in_memory',
        'GAM in bfloat16 on a CPU, maps of one or two rows, eager and compiled',
        "done: torch's gradient of the 7x7 kernels is avoided, which holds what was left in memory",
        'precision',
    ),
    Row(
        '',
        'the same before: 708 steps of small models',
        '158 had gradients up to 1e38 or NaN, all of a 7x7 kernel for 128 channels' + _ONCE,
        'precision',
    ),
    Row(
        '',
        'any other convolution of torch in bfloat16 on a CPU: 128 input channels a group or more, fewer rows than half '
        'its kernel (5x5 and one row, 7x7 and two, 9x9 and three), or of stride 2 and one row',
        "torch's gradient of its weight is wrong, in 250 of 4578 shapes tried; float32 and float16 are right" + _ONCE,
        'precision',
    ),
    Row(
        'fusion/test_compiled.py::test_in_float64_after_a_step_in_float32',
        'a fused, compiled SE-ResNet-18, `.double()` after a step',
        'done: the unfused model to 1e-10, statistics, gradients and types',
        'precision',
    ),
    Row(
        'fusion/test_fusion.py::test_compiled_model_is_equal_in_float32_and_close_in_bfloat16',
        'a fused, compiled model in float32 and in bfloat16 autocast',
        'done: equal, close',
        'compiled',
    ),
    Row(
        'fusion/test_compiled.py::test_in_float16_gradients_are_as_near_to_those_of_float64_as_unfused',
        'a fused, compiled SE-ResNet-18 after `.half()`, a training step',
        'done: every gradient is as near to that of float64 as in the unfused model',
        'compiled',
    ),
    Row(
        '',
        'a fused, compiled CBAM-ResNet-18 after `.half()`, and under bfloat16 autocast, a training step',
        'done: as near to the float64 gradients as the unfused model, 0.04 and 0.20 of their norm at worst in float16, '
        '0.53 and 0.50 in bfloat16' + _ONCE,
        'compiled',
    ),
    Row(
        'fusion/test_compiled.py::test_orders_of_cbam',
        'CBAM in the orders spatial-channel and parallel, fused and compiled',
        'done: the unfused model to 1e-10 in float64, gradients too',
        'compiled',
    ),
    Row(
        'fusion/test_compiled.py::test_nan_is_where_it_is_unfused',
        'one NaN in an image, SE and scSE, fused and compiled, forward and backward',
        'done: NaN where the unfused model has it, and nowhere else',
        'compiled',
    ),
    Row(
        'fusion/test_compiled.py::test_after_a_step_others_export_and_compile_the_unfused_model',
        '`torch.export` and `torch.compile` of a fused, compiled SE-ResNet-18',
        'done: the unfused model to 1e-12 in float64',
        'compiled',
    ),
    Row(
        'fusion/test_compiled.py::test_onnx_has_the_unfused_model',
        'ONNX of a fused, compiled SE-ResNet-18',
        'done: the unfused model to 1e-5',
        'compiled',
    ),
    Row(
        '',
        '`torch.compile` by inductor of a fused, compiled CBAM-ResNet-18',
        'done: 3e-7 from the unfused model' + _ONCE,
        'compiled',
    ),
    Row(
        'fusion/test_compiled.py::test_steps_leave_nothing_behind',
        '20 training steps of a fused, compiled SE-ResNet-18',
        'done: no tensor more after step 10',
        'compiled',
    ),
    Row(
        '',
        '260 training steps of a fused, compiled CBAM-ResNet-18',
        'done: the process takes no more memory after step 20' + _ONCE,
        'compiled',
    ),
    Row(
        'fusion/test_compiled.py::test_a_forked_process_goes_on_and_compiles',
        'a process forked after a step of a fused, compiled SE-ResNet-18, with an empty folder for what is compiled, '
        'and inference of other batch sizes there',
        'done: the unfused model to 1e-10',
        'compiled',
    ),
    Row(
        'fusion/test_compiled.py::test_processes_share_what_is_compiled',
        'two processes that compile what fused blocks call at once, with one empty folder for what is compiled; after '
        'them another, one after all files there were cut off, one with more threads, one with a setting of inductor',
        'done: all as uncompiled, to 1e-12; the next one compiles nothing, the others once each',
        'compiled',
    ),
    Row(
        'fusion/test_fusion.py::test_one_compiled_graph_serves_all_sizes',
        'a fused, compiled model and maps of several sizes',
        'done',
        'compiled',
    ),
    Row(
        'fusion/test_fusion.py::'
        'test_without_a_compiler_or_a_folder_to_write_to_fuse_warns_once_and_computes_all_the_same',
        'no compiler, or no folder for what is compiled that can be written to',
        'done: a warning, once; the unfused model',
        'compiled',
    ),
    Row(
        'fusion/test_fusion.py::test_a_torch_whose_compiler_writes_past_its_buffers_is_not_asked_to_compile',
        'torch before 2.9 on a CPU, whose compiled loops write past their buffers (pytorch issue 159154): in eval mode '
        'with gradients, 2.5 and 2.8 ended the process',
        'done: a warning, once; nothing is compiled',
        'compiled',
    ),
    Row(
        'layers/test_state.py::test_distributed_checkpoints_take_the_gain',
        '`torch.distributed.checkpoint` of an injected model, read into one that `inject` built',
        'done',
        'checkpoints',
    ),
    Row(
        'layers/test_state.py::test_a_missing_or_unexpected_gain_behind_a_wrapper_is_an_error',
        "the files of a registered model, read into an injected one by torch's planner",
        'error that names the key',
        'checkpoints',
    ),
    Row(
        'layers/test_state.py::test_a_registered_model_takes_a_distributed_checkpoints_gain_where_it_asks',
        'the files of an injected model, read into a registered one that asks for the keys the files hold besides',
        'done',
        'checkpoints',
    ),
    Row(
        '',
        'the same without asking: torch reads what the model has keys for, calls nothing of ours, and leaves gains out',
        '**not seen**: gains stay 1, and outputs differ; inject first',
        'checkpoints',
    ),
    Row(
        'test_ddp.py::test_gradients_of_two_processes_equal_those_of_one_on_the_joined_batch',
        'two processes, each attention in its slots, and attention behind convolutions, blocks and stages',
        'done: the gradients of the joined batch, 1e-9',
        'processes',
    ),
    Row(
        'test_injection.py::test_models_that_are_wrapped_for_many_processes_are_refused',
        '`inject` into a model in DistributedDataParallel or FSDP, or with a part that is',
        'refused',
        'processes',
    ),
    Row(
        'test_injection.py::test_wrapped_and_compiled_models_are_refused',
        '`inject` into a model in DataParallel, compiled or scripted',
        'refused',
        'processes',
    ),
    Row(
        'test_scripts.py::test_scripts_take_injected_models_by_keywords_and_by_folder',
        "timm's validate.py and onnx_export.py of `injected`, by keywords with a checkpoint and by folder",
        "done: the model's own numbers",
        'scripts',
    ),
    Row(
        'test_injection.py::test_scripting_modules_of_other_arguments_is_an_error',
        '`torch.jit.script` of attention behind a module that takes something else than one tensor',
        "torch's error, which names the hook and the types; `torch.jit.trace` works",
        'scripts',
    ),
]
