"""The training driver on megatron.core. It knows torch, megatron.core and mindspeed_mm.platform, nothing multimodal.

Who imports the modules below (arguments and state excepted) chooses the platform first:
`platform = mindspeed_mm.platform.get_platform(device)`. A whole run:

    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)                       # and the caller's own flags
    namespace, unknown = parser.parse_known_args(argv)
    arguments.refuse_unknown(parser, unknown)             # ConfigError naming the nearest known flags
    args = arguments.from_namespace(namespace)            # frozen DriverArguments; ConfigError lists all problems
    initialize.initialize(args, platform)                 # process group, parallel_state, seeds, log; torchrun optional
    try:
        state = setup.setup(args, model_provider, platform, hooks)   # model, optimizer, scheduler, checkpoint loaded
        loader = ...                                      # from state.consumed_samples, state.data_parallel_rank/_size
        report = loop.train(state, args, forward_step, iter(loader), hooks)
    finally:
        initialize.shutdown()

What the caller brings
    model_provider(pre_process: bool, post_process: bool) -> MegatronModule
        With virtual stages (pre_process, post_process, vp_stage: int), called for each chunk of this rank's stage.
        One pipeline stage in fp32, on the CPU or on the device, holding its weights and requires_grad flags. It has
        what megatron.core modules have: `.config` (a TransformerConfig), `.set_input_tensor(list)` and
        `.sharded_state_dict(prefix, offsets, metadata)`. setup moves it, sets precision and calculate_per_token_loss in
        its config, and wraps it in Float16Module (--bf16, --fp16) and DistributedDataParallel with gradients in fp32.
    forward_step(data_iterator, model) -> (output, loss_func)
        Takes next(data_iterator) itself. loss_func(output) -> (loss_sum, num_tokens, {"lm loss": (loss_sum.detach(),
        num_tokens)}): loss_sum 0-d float tensor, the sum of this micro-batch's token losses; num_tokens 0-d int tensor,
        its supervised tokens. The driver divides by the tokens of the whole global batch.
    hooks: state.Hooks(describe, extra, compare, added, pad_to_one_length, prepare, loss_name, metrics, after_step)
        each with a default
        describe(batch) -> state.BatchFacts(sample_ids, tokens, supervised, positions, flops, gradient_expected)
            default reads batch.sample_ids, batch.tokens, batch.supervised, batch.input_ids.numel(); flops is forward +
            backward of this micro-batch over the whole model (TFLOP/s and MFU are logged where it is not 0);
            gradient_expected=False says that a zero gradient is right (text only while only the projector is trained)
        extra() -> dict                     JSON-able; run.json["extra"] of every checkpoint (specs, versions, sampler)
        compare(saved_extra) -> list[str]   one line per field in which the checkpoint's architecture differs
        pad_to_one_length(batches) -> batches   micro-batches of a step, asked for with virtual stages
        prepare(state, batches) -> batches  micro-batches of a step before they go through the model, on every rank
        loss_name, metrics                  what the log calls the loss; further keys of what loss_func reports
        after_step(state)                   on every rank, before a checkpoint of the step is written

Functions
    arguments.add_arguments(parser), refuse_unknown(parser, unknown)
    arguments.from_namespace(namespace, world_size=None) -> DriverArguments; .model_flags() -> to compare with JSON
    arguments.with_virtual_stages(args, num_layers) -> args with --num-layers-per-virtual-pipeline-stage made stages
    initialize.initialize(args, platform), initialize.shutdown(), initialize.is_rank_0() -> bool
    watch.naming_lost_ranks()           context around both below: errors of collectives name the lost rank
    setup.setup(args, model_provider, platform, hooks=Hooks()) -> TrainState
    loop.train(state, args, forward_step, data_iterator, hooks=Hooks()) -> TrainReport(iteration, loss, checkpoint)
        stops at --train-iters, --exit-interval, SIGINT, SIGTERM, SIGHUP or SIGUSR1 (saved first where --save is given)
    In checkpoint/:
    checkpointing.save_checkpoint(state, args, hooks) -> Path        = write_snapshot(take_snapshot(...)); saver.Saver
        (of the loop) does the second part in the background with --async-save
    resuming.load_checkpoint(state, args, hooks) -> Path | None      (setup calls it)
    reading.find_checkpoint(folder, step=None) -> Path | None        SAVE (the tracker decides) or an iteration's folder
    reading.read_checkpoint(folder, step=None) -> Checkpoint(path, run, names, get(name) -> full Tensor, shape(name))
        after its checksums were compared
        without a process group, for inference and conversion; run is run.json; model tensors of the iteration and of
        its frozen folder, under plain names such as text_decoder.decoder.layers.3.self_attention.linear_qkv.weight

TrainState: model (list of DDP-wrapped chunks), optimizer, scheduler, platform, iteration, consumed_samples,
    data_parallel_rank, data_parallel_size; .modules -> the bare modules.
Errors: ConfigError (flags), CheckpointError (checkpoints), TrainingError (a step that must not go on).
"""

import mindspeed_mm  # noqa: F401  which chooses a platform before megatron.core is imported, where nobody has
