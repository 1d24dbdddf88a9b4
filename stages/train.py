"""Fine-tune the UNet on latents drawn from stored moments. No VAE, no text encoder, no image is loaded.

Reads  data/base/unet, data/base/scheduler, data/latents.zarr, data/captions.zarr, data/pairs/captions.parquet
Writes data/unet (UNet2DConditionModel, with lora_rank adapters alone; scheduler_config.json to sample with),
       data/snapshots (as data/unet, of earlier steps),
       data/training (curves, previews), data/training_speed.json (this machine's; no output of DVC's)
Params train, validation
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from stages.lib.core.files import fresh_directory, write_json
from stages.lib.core.fingerprints import code_identity, fingerprint
from stages.lib.core.paths import (
    BASE,
    CURVES,
    PLOTS,
    PREVIEWS,
    RUN_FILE,
    SNAPSHOTS,
    TRAINED_UNET,
    TRAINING,
    TRAINING_SPEED,
)
from stages.lib.core.sums import SUMS, hash_file, write_sums
from stages.lib.data.pairs import VALIDATION
from stages.lib.diffusion.schedule import sampling_config, training_scheduler
from stages.lib.frame.params import Params
from stages.lib.frame.progress import progress_bar
from stages.lib.frame.run import run_stage
from stages.lib.frame.speed import Speed
from stages.lib.frame.start_up import leave_out
from stages.lib.frame.work_directory import work_root
from stages.lib.models.layout import check_component, read_config
from stages.lib.training.batches import num_train_steps, parts_of_process
from stages.lib.training.checkpoints import Checkpoints, Resumed, load_weights
from stages.lib.training.failures import memory_advice
from stages.lib.training.feed import Feed, TrainingData, read_training_data
from stages.lib.training.history import History, PreviewLatents
from stages.lib.training.learner import Learner, prepare
from stages.lib.training.lineage import (
    environment_of,
    exported_lineage,
    lineage_of,
    measure,
    passed_through,
    run_identity,
    yardstick,
)
from stages.lib.training.loop import Watch, is_due, train_steps
from stages.lib.training.optimizers import OPTIMIZERS
from stages.lib.training.processes import (
    check_same_step,
    of_first_process,
    start_accelerator,
    unsharded,
)
from stages.lib.training.unet import build_unet, check_shapes, export_unet

# Reached by `main`, and changing no weight: what names the run, keeps it, looks at it and writes it out.
WATCHING = (Checkpoints, Watch, code_identity, lineage_of, memory_advice, run_identity)


def main(params: Params) -> None:
    options = params.train
    accelerator = start_accelerator(options)
    for component in ("unet", "scheduler"):
        check_component(BASE, component)
    data = read_training_data(options)
    indices, num_parts = parts_of_process(options, accelerator.process_index, accelerator.num_processes)
    max_train_steps = num_train_steps(options, data.training_set)
    base_config = read_config(BASE / "scheduler" / "scheduler_config.json")
    scheduler = training_scheduler(base_config, options.prediction_type, options.rescale_betas_zero_snr)
    unet = build_unet(BASE, options)
    check_shapes(unet, data.latents, data.conditioning)

    lineage = lineage_of(
        params, BASE, scheduler.config.prediction_type, data.samples, data.latents, data.conditioning,
        code_identity(main, without=(*WATCHING, *EXPORTING, check_disk, watch_run)),
    )  # fmt: skip
    checkpoints = Checkpoints(work_root(), run_identity(lineage), accelerator.is_main_process)
    learner = prepare(accelerator, unet, scheduler, options, max_train_steps)
    checkpoints.own(of_first_process)
    saved = checkpoints.load_latest(fingerprint(yardstick(params)) if options.export == "best" else None)
    resumed = learner.state.restore(saved)
    check_same_step(resumed.global_step)

    sampling = sampling_config(base_config, scheduler)
    watch = watch_run(params, learner, data, sampling, checkpoints, resumed, max_train_steps)
    parts_of = functools.partial(
        data.parts_of_step, options, scheduler.config.num_train_timesteps,
        indices, num_parts, accelerator.device,
    )  # fmt: skip
    check_disk(params, learner, watch)
    watch.before_first_step()
    train_steps(learner, Feed(parts_of, watch.steps_left, accelerator.device), data, options, watch)
    watch.close()
    export(params, learner, watch, sampling, lineage)
    export_snapshots(params, learner, watch, sampling, lineage)
    if accelerator.is_main_process:
        write_hashes()


def watch_run(
    params: Params,
    learner: Learner,
    data: TrainingData,
    sampling: Mapping[str, Any],
    checkpoints: Checkpoints,
    resumed: Resumed,
    max_train_steps: int,
) -> Watch:
    """What looks at the run between two steps and keeps it; it goes on where ``resumed`` says."""
    options, accelerator = params.train, learner.accelerator
    is_main, size = accelerator.is_main_process, options.train_batch_size
    measured = fingerprint(measure(params))
    history = History(TRAINING, resumed.points_measured_by(measured), is_main)
    is_over = history.has_stalled(options.early_stopping_patience) or resumed.global_step >= max_train_steps
    environments = resumed.environments
    if not is_over:
        environments = passed_through(environments, environment_of(accelerator, options))
    return Watch(
        learner=learner,
        data=data,
        params=params,
        sampling=sampling,
        steps_left=range(resumed.global_step, resumed.global_step if is_over else max_train_steps),
        max_train_steps=max_train_steps,
        checkpoints=checkpoints,
        history=history,
        previews=PreviewLatents(
            PREVIEWS, data.samples, options, resumed.previews, resumed.preview_recipe, is_main
        ),
        environments=environments,
        measure=measured,
        measure_again=not resumed.is_measured_by(measured),
        yardstick=resumed.yardstick_now(fingerprint(yardstick(params))),
        progress=progress_bar("train", "images", max_train_steps * size, resumed.global_step * size, is_main),
        speed=Speed(size, accelerator.device),
        num_steps=resumed.global_step,
    )


def check_disk(params: Params, learner: Learner, watch: Watch) -> None:
    """Raise StageError before the first step if the disk is too small for what the run keeps."""
    num_checkpoints = -(-len(watch.steps_left) // params.train.checkpoint_every_steps)
    has_best = any(sample.split == VALIDATION for sample in watch.data.samples)
    num_snapshots = sum(step in watch.steps_left for step in snapshot_steps(params, watch))
    watch.checkpoints.check_room(*learner.state_bytes(params.train), num_checkpoints, has_best, num_snapshots)


def export(
    params: Params, learner: Learner, watch: Watch, sampling: Mapping[str, Any], lineage: Mapping[str, str]
) -> None:
    """data/unet: the weights that the params ask for, the scheduler to sample them with, their lineage."""
    options, accelerator = params.train, learner.accelerator
    if accelerator.is_main_process and (summary := watch.speed.report()):
        write_json(TRAINING_SPEED, summary)
    accelerator.wait_for_everyone()  # the first process may still write the best weights
    global_step = watch.history.best_step if options.export == "best" else watch.num_steps
    with learner.averaged(options.export_ema):
        if options.export == "best":
            load_weights(learner.trained, watch.checkpoints.load_best(global_step))
        whole = unsharded(learner.unet, BASE)
        if accelerator.is_main_process:
            texts = exported_lineage(lineage, watch.environments, options, global_step)
            export_unet(whole, TRAINED_UNET, sampling, texts)


def snapshot_steps(params: Params, watch: Watch) -> list[int]:
    """After how many steps data/snapshots gets weights, in a run that goes on to its end."""
    every, last = params.train.snapshot_every_steps, watch.max_train_steps
    return [step for step in range(1, last + 1) if is_due(step, last, every)]


def export_snapshots(
    params: Params, learner: Learner, watch: Watch, sampling: Mapping[str, Any], lineage: Mapping[str, str]
) -> None:
    """data/snapshots/step-*: as data/unet, of the steps that ``snapshot_every_steps`` asks for.

    Those of a run whose checkpoints have passed them by, under another interval, are told and left out.
    """
    is_main = learner.accelerator.is_main_process
    if is_main:
        fresh_directory(SNAPSHOTS)
    for step in snapshot_steps(params, watch):
        if step > watch.num_steps:
            break
        weights = watch.checkpoints.load_snapshot(step, watch.exports_average)
        if weights is None:
            continue
        load_weights(learner.trained, weights)
        whole = unsharded(learner.unet, BASE)
        if is_main:
            of_a_step = params.train.model_copy(update={"export": "last"})
            texts = exported_lineage(lineage, watch.environments, of_a_step, step)
            export_unet(whole, SNAPSHOTS / f"step-{step:06d}", sampling, texts)


def write_hashes() -> None:
    """Hashes of what was made, and in curves and previews the hash of the weights that they belong to."""
    CURVES.mkdir(parents=True, exist_ok=True)  # without a step and held-out samples nothing is logged
    for directory in (PLOTS, PREVIEWS):
        write_json(directory / RUN_FILE, {"unet_sha256": hash_file(TRAINED_UNET / SUMS)})
        write_sums(directory)


EXPORTING = (export, export_snapshots, write_hashes)  # change no weight either


def lean_main(params: Params) -> None:
    """``main`` in a process of its own, which need not import what libraries import if they find it."""
    packages = OPTIMIZERS[params.train.optimizer].packages
    if params.train.lora_rank is None and not packages:
        leave_out("pandas", "peft", "scipy", "transformers")
    with memory_advice(params.train):
        main(params)


if __name__ == "__main__":
    run_stage("train", ("train", "validation"), lean_main, distributed=True)
