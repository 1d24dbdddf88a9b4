"""Section train of params.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, Field

from stages.lib.frame.sections.section import (
    Entry,
    Flag,
    Number,
    OneOrSeveral,
    Section,
    Several,
    Text,
    Whole,
    check,
    no_is_text,
)

POLYNOMIAL_END = 1e-7  # learning rate that diffusers' polynomial schedule ends with


class ModuleRank(Entry):
    """Rank of the adapters of some modules."""

    modules: Text = Field(description="pattern of their whole names, with * and ?")
    rank: Annotated[Whole, Ge(1)] = Field(description="as train.lora_rank")
    alpha: Annotated[Number, Gt(0)] | None = Field(None, description="as train.lora_alpha, which null takes")


class Train(Section):
    """How the UNet is fine-tuned."""

    section: ClassVar[str] = "train"

    seed: Annotated[Whole, Ge(0)] = Field(
        description="of data order, posterior samples, noise, timesteps and dropout"
    )
    train_batch_size: Annotated[Whole, Ge(1)] = Field(
        description="images an optimizer step, over all processes and accumulation"
    )
    max_train_steps: Annotated[Whole, Ge(0)] | None = Field(
        description="optimizer steps; null with num_train_epochs; 0 leaves the UNet as it is"
    )
    num_train_epochs: Annotated[Whole, Ge(1)] | None = Field(
        description="passes over the training split; null with max_train_steps"
    )
    early_stopping_patience: Annotated[Whole, Ge(1)] | None = Field(
        description="validations without a better loss before the run ends; null never"
    )
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = Field(
        description="epsilon | v_prediction | sample; null keeps the base's"
    )
    rescale_betas_zero_snr: Flag = Field(description="end the noise schedule in pure noise; not with epsilon")
    snr_gamma: Annotated[Number, Gt(0)] | None = Field(
        description="Min-SNR gamma, usually 5; null is the plain MSE"
    )
    timestep_sampling: Literal["uniform", "stratified"] = Field(
        description="uniform | stratified: one timestep from each equal part of the schedule"
    )
    noise_offset: Annotated[Number, Ge(0)] = Field(
        description="standard deviation of a mean added to each channel's noise, usually 0.05"
    )
    input_perturbation: Annotated[Number, Ge(0)] = Field(
        description="scale of noise added to the noisy input alone, usually 0.1"
    )
    mask_floor: Annotated[Number, Ge(0), Le(1)] = Field(
        description="weight of the loss where an image's mask is 0, used with masks; 1 ignores them"
    )
    caption_dropout: Annotated[Number, Ge(0), Le(1)] = Field(
        description="share of samples trained on the empty caption, 0 to 1"
    )
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = Field(
        description="adamw | adamw_8bit (a GPU and bitsandbytes) | adafactor"
    )
    learning_rate: Annotated[Number, Ge(0)] = Field(description="peak")
    lr_scheduler: Literal["constant", "cosine", "cosine_with_restarts", "linear", "polynomial"] = Field(
        description="after the warm-up: constant, cosine, linear and others; a wrong name names them all"
    )
    lr_warmup_steps: Annotated[Whole, Ge(0)] = Field(description="optimizer steps from zero to the peak")
    lr_num_cycles: Annotated[Whole, Ge(1)] = Field(description="of cosine_with_restarts")
    lr_power: Annotated[Number, Gt(0)] = Field(description="of polynomial")
    adam_beta1: Annotated[Number, Ge(0), Lt(1)] = Field(description="decay of the first moment, 0 to 1")
    adam_beta2: Annotated[Number, Ge(0), Lt(1)] = Field(description="decay of the second moment, 0 to 1")
    adam_weight_decay: Annotated[Number, Ge(0)] = Field(
        description="decoupled, a step and unit of learning rate"
    )
    adam_epsilon: Annotated[Number, Ge(0)] = Field(description="added to the denominator")
    max_grad_norm: Annotated[Number, Gt(0)] = Field(
        description="global L2 norm that gradients are clipped to"
    )
    use_ema: Flag = Field(description="keep a moving average of the weights")
    ema_decay: Annotated[Number, Ge(0), Le(1)] = Field(
        description="upper bound of the average's decay a step, 0 to 1"
    )
    ema_power: Annotated[Number, Gt(0)] | None = Field(
        description="warm-up of the decay as 1 - (1 + n) ** -power; null as (1 + n) / (10 + n)"
    )
    ema_update_after_step: Annotated[Whole, Ge(0)] = Field(
        description="optimizer steps before averaging starts"
    )
    adapter: Literal["lora", "dora", "lokr", "loha"] = Field(
        description="lora | dora | lokr | loha: kind of the adapters, used with lora_rank"
    )
    lora_rank: Annotated[Whole, Ge(1)] | None = Field(
        description="rank of adapters trained in the UNet's place; null trains the UNet"
    )
    lora_alpha: Annotated[Number, Gt(0)] = Field(description="adapters are scaled by lora_alpha / lora_rank")
    lora_by_module: Several[ModuleRank] | None = Field(
        description="other ranks of some modules: modules (e.g. mid_block.*), rank, alpha of each"
    )
    lora_target_modules: OneOrSeveral[Text] = Field(
        description="ends of the names of modules with an adapter, or a preset"
    )
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(no_is_text)] = Field(
        description="no | bf16 | fp16: arithmetic of the forward and backward pass"
    )
    allow_tf32: Flag = Field(description="TF32 for float32 matrices and convolutions on a GPU")
    gradient_accumulation_steps: Annotated[Whole, Ge(1)] = Field(
        description="forward passes that train_batch_size is split into"
    )
    gradient_checkpointing: Flag = Field(
        description="compute activations again in the backward pass: less memory, slower"
    )
    channels_last: Flag = Field(description="memory format; faster for convolutions on CPU and GPU")
    torch_compile: Flag = Field(description="compile the UNet; pays on a GPU after some hundred steps")
    log_every_steps: Annotated[Whole, Ge(1)] = Field(
        description="optimizer steps between two points of the training curves"
    )
    validation_every_steps: Annotated[Whole, Ge(1)] = Field(
        description="optimizer steps between two validation losses"
    )
    validate_ema: Flag = Field(description="with use_ema, validate and preview the average")
    checkpoint_every_steps: Annotated[Whole, Ge(1)] = Field(
        description="optimizer steps between two resumable checkpoints"
    )
    preview_every_steps: Annotated[Whole, Ge(1)] | None = Field(
        description="optimizer steps between two sets of previews; null makes none"
    )
    snapshot_every_steps: Annotated[Whole, Ge(1)] | None = Field(
        description="optimizer steps between two exports of the weights to data/snapshots; null makes none"
    )
    num_previews: Annotated[Whole, Ge(1)] = Field(description="held-out captions that are previewed")
    preview_guidance_scale: Annotated[Number, Ge(1)] = Field(description="of previews; 1 is no guidance")
    export: Literal["last", "best"] = Field(
        description="last | best: weights of the last step or of the best validation loss"
    )
    export_ema: Flag = Field(description="with use_ema, export the average")
    max_resident_bytes: Annotated[Whole, Ge(0)] = Field(
        description="data larger than this is read from disk as it is drawn"
    )

    @check
    def _parts(self) -> Iterator[tuple[str, str]]:
        if self.train_batch_size % self.gradient_accumulation_steps:
            yield "gradient_accumulation_steps", f"a divisor of train_batch_size {self.train_batch_size}"

    @check
    def _length(self) -> Iterator[tuple[str, str]]:
        if (self.max_train_steps is None) == (self.num_train_epochs is None):
            yield "max_train_steps", "a number here or in num_train_epochs, and null in the other"

    @check
    def _warm_up(self) -> Iterator[tuple[str, str]]:
        if self.max_train_steps and self.lr_warmup_steps > self.max_train_steps:
            yield "lr_warmup_steps", f"at most max_train_steps {self.max_train_steps}"

    @check
    def _nothing_to_choose(self) -> Iterator[tuple[str, str]]:
        if self.max_train_steps == 0 and self.export == "best":
            yield "export", "last with max_train_steps 0: the base's UNet is the only one"

    @check
    def _pure_noise(self) -> Iterator[tuple[str, str]]:
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            expected = (
                "v_prediction or sample with rescale_betas_zero_snr: pure noise teaches epsilon nothing"
            )
            yield "prediction_type", expected

    @check
    def _end_of_schedule(self) -> Iterator[tuple[str, str]]:
        if self.lr_scheduler == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            yield "learning_rate", f"more than {POLYNOMIAL_END:g}, where lr_scheduler: polynomial ends"
