"""Textual inversion (Gal et al. 2022, equation 2): the vectors that reconstruct the pictures best.

The UNet is frozen, and so is the text encoder but for the new vectors. Draws, noise, target and loss are
those of train. The vectors, their optimizer and the curves lie in a checkpoint of the work directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from stages.lib.core.devices import to_device, use_same_kernels
from stages.lib.core.files import fresh_directory
from stages.lib.core.paths import BASE, EMBEDDINGS, PAIR_CAPTIONS
from stages.lib.data.pairs import SampleCaptions
from stages.lib.diffusion.loss import denoising_target, mask_weights, sample_losses
from stages.lib.diffusion.noise import sample_latents
from stages.lib.diffusion.schedule import training_scheduler
from stages.lib.diffusion.validation import validation_losses
from stages.lib.encoding.conditioning import Conditioning, check_text_encoder, read_conditioning
from stages.lib.encoding.latents import Latents, read_latents, read_samples
from stages.lib.encoding.text_encoder import encode_text
from stages.lib.encoding.windows import token_windows
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Params, Train, Validation
from stages.lib.frame.progress import progress_bar
from stages.lib.frame.sections.invert import Invert
from stages.lib.frame.work_directory import work_root
from stages.lib.inversion.lineage import environments_of, identity_of, lineage_of
from stages.lib.inversion.placeholder import Placeholder, PlaceholderEmbedding, initial_vectors, install
from stages.lib.inversion.texts import samples_holding, set_to_learn_from, texts_of_samples, with_states
from stages.lib.models.layout import read_config
from stages.lib.models.loaders import load_text_encoder, load_tokenizer, load_unet
from stages.lib.training.batches import Batch, TrainingSet, draw_batch
from stages.lib.training.checkpoints import Checkpoints, Resumed, TrainingState
from stages.lib.training.history import History

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler


# Reached by `learn`, and changing no vector: what names the run, keeps it and looks at it.
WATCHING = (Checkpoints, History, environments_of, identity_of, lineage_of)


@dataclass(frozen=True)
class Inverter:
    """Everything a step takes.

    Attributes:
        options: of the run.
        unet, text_encoder: frozen, on ``device``, in eval mode.
        embedding: of the text encoder, whose ``vectors`` are trained.
        scheduler: the noise schedule of the base.
        texts: those learned from; the first is "".
        input_ids: (U, C, 77) int64 of them, on ``device``.
        samples: of both splits, with texts in the place of captions.
        training_set: what may be drawn; ``caption_rows`` are places in ``texts``.
        latents, conditioning: of the data set.
    """

    options: Invert
    unet: UNet2DConditionModel
    text_encoder: Any
    embedding: PlaceholderEmbedding
    scheduler: DDPMScheduler
    texts: list[str]
    input_ids: torch.Tensor
    samples: list[SampleCaptions]
    training_set: TrainingSet
    latents: Latents
    conditioning: Conditioning
    device: torch.device

    def encoded(self, rows: torch.Tensor) -> torch.Tensor:
        """(B,) places in ``texts`` -> encoder_hidden_states (B, C * 77, D), with the vectors as they are."""
        windows = self.input_ids[rows.to(self.device)]  # (B, C, 77)
        states = encode_text(self.text_encoder, windows.flatten(0, 1), self.conditioning.clip_skip)
        return states.unflatten(0, windows.shape[:2]).flatten(1, 2)

    def draw(self, global_step: int) -> Batch:
        """The batch of a step: a function of (seed, global_step), drawn as train draws."""
        drawn = Train.model_construct(
            seed=self.options.seed, train_batch_size=self.options.train_batch_size,
            noise_offset=0.0, input_perturbation=0.0, caption_dropout=0.0, timestep_sampling="uniform",
        )  # fmt: skip
        return draw_batch(self.training_set, drawn, global_step, self.scheduler.config.num_train_timesteps)


def build_inverter(options: Invert, base_config: dict[str, Any]) -> Inverter:
    """Load the base, make it know the placeholder, and open what it is learned from.

    Raises:
        StageError: if a store is missing, damaged or of another base, the placeholder is no new word, or no
            sample holds it.
    """
    word = options.placeholder
    assert word is not None  # the stage asks for it first
    use_same_kernels()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    latents, conditioning = read_latents(), read_conditioning(resident=False)
    check_text_encoder(conditioning, BASE)
    if len(conditioning.family.text_encoders) > 1:
        raise StageError(
            "params.yaml: invert.placeholder: expected a base with one text encoder, got "
            f"{len(conditioning.family.text_encoders)} in {BASE}, as Stable Diffusion XL has: a word is not "
            "learned for several yet; set it to null"
        )
    samples = samples_holding(read_samples(latents, conditioning, PAIR_CAPTIONS), options)
    texts = texts_of_samples(samples)

    tokenizer, text_encoder = load_tokenizer(BASE), load_text_encoder(BASE).to(device)
    unet = load_unet(BASE).to(device)
    for model in (unet, text_encoder):
        model.requires_grad_(False)
    table = text_encoder.get_input_embeddings()
    vectors = initial_vectors(tokenizer, table, options.initializer, options.num_vectors)
    placeholder = Placeholder(word, vectors)
    embedding = install(tokenizer, text_encoder, placeholder)
    spelled = [placeholder.spelled(text) for text in texts]
    windows, _ = token_windows(tokenizer, spelled, conditioning.num_chunks)  # (U, C, 77)
    input_ids = torch.from_numpy(windows).long()
    _check_whole(texts, input_ids, embedding.first_id, options)
    return Inverter(
        options, unet, text_encoder, embedding, training_scheduler(base_config), texts, input_ids.to(device),
        samples, set_to_learn_from(samples, texts, latents, conditioning), latents, conditioning, device,
    )  # fmt: skip


def step_losses(inverter: Inverter, batch: Batch) -> torch.Tensor:
    """The denoising loss of each sample of a batch, (B,), a function of the vectors alone."""
    options, scheduler, device = inverter.options, inverter.scheduler, inverter.device
    mean, logvar = inverter.latents.moments(batch.latent_rows, batch.views, device)
    mask = inverter.latents.masks(batch.latent_rows, batch.views, device)
    noise, timesteps = to_device(batch.noise, device), to_device(batch.timesteps, device)
    latents = sample_latents(
        mean, logvar, to_device(batch.posterior_noise, device),
        inverter.latents.scaling_factor, inverter.latents.shift_factor,
    )  # fmt: skip
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)  # (B, 4, h, w)
    target = denoising_target(scheduler, latents, noise, timesteps)
    with _arithmetic(options, device):
        encoder_hidden_states = inverter.encoded(batch.caption_rows)  # (B, C * 77, D)
        model_pred = inverter.unet(noisy_latents, timesteps, encoder_hidden_states).sample
    weights = None if mask is None else mask_weights(mask, options.mask_floor)
    return sample_losses(model_pred, target, weights)


def held_out_losses(inverter: Inverter, options: Validation) -> dict[str, float]:
    """The held-out loss with the vectors as they are, named apart from train's; empty with none held out."""
    with torch.no_grad():
        rows = torch.arange(len(inverter.texts))
        states = torch.cat([inverter.encoded(row[None]).cpu() for row in rows])  # (U, C * 77, D)
    found = validation_losses(
        inverter.unet.forward, inverter.scheduler, inverter.latents,
        with_states(inverter.conditioning, inverter.texts, states), inverter.samples, options,
        inverter.device,
    )  # fmt: skip
    return {f"inversion_{name}": value for name, value in found.summary().items()}


def learn(params: Params, code: str) -> tuple[Placeholder, dict[str, str]]:
    """Learn the placeholder's vectors, or go on where an earlier run of this very training ended.

    Args:
        params: sections invert and validation.
        code: hash of the code that computes.

    Returns:
        The placeholder, and its lineage as texts.

    Raises:
        StageError: as of `build_inverter`, and if the loss is no longer finite.
    """
    options = params.invert
    base_config = read_config(BASE / "scheduler" / "scheduler_config.json")
    inverter = build_inverter(options, base_config)
    lineage = lineage_of(params, inverter.samples, inverter.latents, inverter.conditioning, code)
    checkpoints = Checkpoints(work_root(), identity_of(lineage))
    checkpoints.own()
    vectors = inverter.embedding.vectors
    optimizer = torch.optim.AdamW([vectors], lr=options.learning_rate, weight_decay=options.adam_weight_decay)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state = TrainingState([vectors], optimizer, lr_scheduler, None, None)
    resumed = state.restore(checkpoints.load_latest())
    environments = environments_of(resumed, options, inverter.device)

    fresh_directory(EMBEDDINGS)
    history = History(EMBEDDINGS, resumed.points, enabled=True)
    _run(inverter, params.validation, state, checkpoints, resumed, history, environments)
    history.close()
    assert options.placeholder is not None
    learned = Placeholder(options.placeholder, vectors.detach().cpu())
    return learned, {**lineage, **_exported(environments, options)}


def _run(
    inverter: Inverter,
    validation: Validation,
    state: TrainingState,
    checkpoints: Checkpoints,
    resumed: Resumed,
    history: History,
    environments: list[dict[str, str]],
) -> None:
    """Every step that is left; curves and checkpoints where they are due."""
    options, (optimizer, vectors) = inverter.options, (state.parts["optimizer"], state.parameters[0])
    total, size = options.max_train_steps, options.train_batch_size
    if resumed.global_step == 0:
        history.log(0, held_out_losses(inverter, validation))
    losses: list[torch.Tensor] = []
    with progress_bar("invert", "images", total * size, resumed.global_step * size) as bar:
        for global_step in range(resumed.global_step, total):
            loss = step_losses(inverter, inverter.draw(global_step)).mean()
            loss.backward()
            limit = float("inf") if options.max_grad_norm is None else options.max_grad_norm
            grad_norm = torch.nn.utils.clip_grad_norm_([vectors], limit)
            optimizer.step()
            optimizer.zero_grad()
            state.parts["lr_scheduler"].step()
            losses.append(loss.detach())
            bar.update(size)

            num_steps = global_step + 1
            is_last = num_steps == total
            validate = is_last or num_steps % options.validation_every_steps == 0
            save = is_last or num_steps % options.checkpoint_every_steps == 0
            if not (validate or save or num_steps % options.log_every_steps == 0):
                continue
            point = _point(losses, grad_norm, num_steps, checkpoints)
            losses.clear()
            history.log(num_steps, point | (held_out_losses(inverter, validation) if validate else {}))
            if save:
                checkpoints.save(num_steps, {**_watched(history, environments), **state.capture()})


def _point(
    losses: Sequence[torch.Tensor], grad_norm: torch.Tensor, num_steps: int, checkpoints: Checkpoints
) -> dict[str, float]:
    loss = float(torch.stack(list(losses)).mean())
    if not torch.isfinite(torch.tensor([loss, float(grad_norm)])).all():
        raise StageError(
            f"invert: expected a finite loss and gradient, got {loss:g} and {float(grad_norm):g} by step "
            f"{num_steps}; lower invert.learning_rate; {checkpoints.kept()}"
        )
    return {"inversion_loss": loss, "inversion_grad_norm": float(grad_norm)}


def _watched(history: History, environments: list[dict[str, str]]) -> dict[str, Any]:
    """What a checkpoint holds beside the state; of what train keeps and this has none, nothing."""
    nothing = {each.name: None for each in dataclasses.fields(Resumed) if each.name != "global_step"}
    return nothing | {"points": history.points, "previews": {}, "environments": environments}


def _exported(environments: list[dict[str, str]], options: Invert) -> dict[str, str]:
    exported = {"step": options.max_train_steps}
    return {"environments": json.dumps(environments, sort_keys=True), "exported": json.dumps(exported)}


def _arithmetic(options: Invert, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if options.mixed_precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _check_whole(texts: list[str], input_ids: torch.Tensor, first_id: int, options: Invert) -> None:
    """Raise StageError if a text is cut before all tokens of the placeholder are in it."""
    num_new = (input_ids >= first_id).flatten(1).sum(dim=1)  # (U,)
    cut = [
        text
        for text, count in zip(texts, num_new.tolist(), strict=True)
        if count != options.num_vectors * text.count(options.placeholder or "\0")
    ]
    if cut:
        raise StageError(
            f"params.yaml: invert.captions: expected texts that hold all {options.num_vectors} tokens of "
            f"{options.placeholder!r}, got {len(cut)} that are cut before, e.g. {cut[0]!r}; shorten them, "
            "lower invert.num_vectors, or raise tokenize.num_chunks"
        )
