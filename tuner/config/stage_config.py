"""Configs shared by all stages, by those that train, that train one model, and that train it on packed rows."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tuner.config.adapter import Adapter
from tuner.config.base import FOLDER_NAME, ConfigBase
from tuner.config.data import Data
from tuner.config.evaluation import Validation
from tuner.config.memory_size import MemorySize
from tuner.config.model import Freeze, Model
from tuner.config.parallel import Parallel
from tuner.config.training import (
    EXCLUDED_BY,
    AdamW,
    Checkpoint,
    Cosine,
    KernelName,
    Kernels,
    Recomputation,
    Schedule,
    Wandb,
)


class StageConfig(ConfigBase):
    """Fields of every stage.

    A stage's config class also has a field `stage`, a literal that names the stage in JSON.
    """

    implementation: ClassVar[str]
    """Module whose `STAGE` runs configs of this class; imported when a stage runs, never by loading a config."""

    keeps_milestones: ClassVar[bool] = True
    """Whether `checkpoint.milestones` can be kept."""

    name: str | None = Field(default=None, max_length=200, pattern=FOLDER_NAME)
    """Name of the run's folder within --runs; None: the config file's name."""

    max_steps: int | None = Field(default=None, ge=1)
    """Maximum number of steps, over which the learning rate schedule then runs; None: set by `epochs`. A step is an
    optimizer step, or in reinforcement learning a rollout with all its updates."""

    seed: int = Field(default=0, ge=0)
    """Random seed of data order, weight initialization, dropout and sampling."""

    checkpoint: Checkpoint = Checkpoint()
    """When checkpoints are saved, and how many are kept."""

    tracking: Wandb | None = None
    """Weights & Biases logging; None: log to files only."""

    @model_validator(mode="after")
    def _milestones_can_be_kept(self) -> Self:
        if self.checkpoint.milestones and not self.keeps_milestones:
            raise ValueError("checkpoint.milestones cannot be kept by TRL's trainers: leave it out")
        return self


class TrainingConfig(StageConfig):
    """A stage with a training loop of its own."""

    in_layouts: ClassVar[bool] = True
    """Whether `parallel` can say anything but that each process is for itself."""

    epochs: float = Field(default=1.0, gt=0, le=10_000)
    """Passes over the training rows (reinforcement learning: over the prompts)."""

    optimizer: AdamW = AdamW()
    """Optimizer settings."""

    schedule: Schedule = Cosine()
    """Learning rate schedule."""

    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are clipped to this L2 norm over all trained weights (PPO: policy and critic separately); None: not
    clipped."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of matrix products; trained weights are held in fp32, and so is the optimizer state with
    optimizer.bits=32."""

    gradient_checkpointing: Recomputation = True
    """What layers compute again in the backward pass, with the same result. True: all but their input, about a third
    more time, far less memory. "selective": what is cheap, keeping the results of matrix products. "offload": as True,
    the inputs waiting in host memory (for very long rows). False: nothing."""

    mlp_tile: int | None = Field(default=None, ge=1)
    """Tokens for which layers compute their MLP at a time, again in the backward pass; None: all of the row. For very
    long rows, in which one layer's MLP needs most of the memory; the same result, but for rounding."""

    memory: MemorySize = None
    """Memory that the run may take of each device: a size such as "12GiB", CUDA's own part included, or "auto", what
    the GPU has free when the run begins. The run then chooses `gradient_checkpointing`, `tokens_per_pass` and
    `sampling.cache_gib` itself, whatever they say: the fastest of them whose planned peak fits. (DPO and KTO: only the
    first, as their passes are part of the result.) None: they are used as written."""

    kernels: Kernels = "plain"
    """What computes the layers. "plain": transformers' and peft's modules. ("compile",): torch.compile of each layer,
    which fuses what is not a product of matrices. ("liger",): Liger's Triton kernels for norms, rotary positions and
    gated MLPs (CUDA; `pip install liger-kernel`). ("lora",): LoRA layers without dropout that share an input have one
    backward pass, written out; it goes with "liger". "auto": in this order those that are there and exclude none
    before. Each must prove on the run's own model that it computes the same but for rounding: "auto" leaves out what
    does not, and a resumed run keeps what was chosen."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; "auto": the GPU if there is one."""

    deterministic: bool = False
    """Deterministic CUDA kernels, for bit-exact resuming at some cost in speed; CPU runs always resume bit-exactly."""

    parallel: Parallel = Parallel()
    """How several processes hold the model together."""

    @model_validator(mode="after")
    def _has_a_layout(self) -> Self:
        for name in ("shard", "sequence"):
            if (size := getattr(self.parallel, name)) > 1 and not self.in_layouts:
                raise ValueError(
                    f"parallel.{name}={size}: TRL's trainers hold the model whole, and compute rows of their own, in "
                    "every process; leave parallel out"
                )
        return self

    @model_validator(mode="after")
    def _passes_are_its_own(self) -> Self:
        if self.in_layouts:
            return self
        if isinstance(self.gradient_checkpointing, str):
            raise ValueError(
                f'gradient_checkpointing="{self.gradient_checkpointing}" is for packed rows, and TRL\'s trainers pad '
                "theirs: write true or false"
            )
        if self.mlp_tile is not None:
            raise ValueError("mlp_tile is for packed rows, and TRL's trainers pad theirs: leave it out")
        if self.kernels != "plain":
            raise ValueError("kernels are for packed rows, and TRL's trainers pad theirs: leave them out")
        return self

    @model_validator(mode="after")
    def _kernels_fit(self) -> Self:
        if isinstance(self.kernels, str):
            return self
        if not self.kernels or len(set(self.kernels)) < len(self.kernels):
            raise ValueError(f'kernels={self.kernels}: name each kernel once, or write "plain" for none')
        for name in self.kernels:
            if (other := EXCLUDED_BY.get(name)) in self.kernels:
                raise ValueError(
                    f'kernels: "{other}" fuses what other kernels replace; leave it or the others out'
                )
            if (conflict := self.kernel_conflict(name)) is not None:
                raise ValueError(f'kernels: "{name}" {conflict}')
        return self

    def kernel_conflict(self, name: KernelName) -> str | None:
        """Why the other settings rule a kernel out, as the rest of a sentence about it; None where they do not."""
        if self.parallel.shard > 1 or self.parallel.sequence > 1:
            return "excludes parallel: it is for processes that each hold a model and their rows whole; leave one out"
        if self.gradient_checkpointing == "selective":
            what: dict[KernelName, str] = {
                "compile": "a layer that is compiled decides by itself what it keeps",
                "liger": "its rotary kernel writes over results of products, which would be kept",
            }
            if name in what:
                return f'excludes gradient_checkpointing="selective": {what[name]}; write true or false'
        if name == "compile" and self.mlp_tile is not None:
            return "excludes mlp_tile, whose calls for each tile are not compiled; leave one of them out"
        for field in ("adapter", "critic_adapter"):
            adapter: Adapter | None = getattr(self, field, None)
            if name == "lora" and adapter is not None and adapter.dropout > 0:
                return f"excludes {field}.dropout, of which it has no backward pass; set {field}.dropout to 0"
        return None


class SingleModelConfig(TrainingConfig):
    """A stage that trains one model."""

    model: Model
    """Model to train."""

    adapter: Adapter | None = None
    """Train an adapter instead of the model's weights; None: full-parameter training. A model that is a run with an
    adapter continues that adapter."""

    @model_validator(mode="after")
    def _quantized_weights_are_frozen(self) -> Self:
        if self.model.quantization and self.adapter is None:
            raise ValueError(
                f"model.quantization={self.model.quantization!r} can only train an adapter: "
                "add adapter=LoRA(), or leave quantization out"
            )
        return self


class PackedConfig(SingleModelConfig):
    """A stage that trains one model on packed rows."""

    data: Data
    """Data to train on."""

    freeze: Freeze | None = None
    """Weights to freeze; None: every trainable weight is trained."""

    tokens_per_step: int = Field(default=32_768, ge=1)
    """Tokens per optimizer step, over all devices."""

    tokens_per_pass: int = Field(default=2_048, ge=1)
    """Tokens in one forward and backward pass: affects memory and speed, never the result."""

    max_bad_steps: int = Field(default=3, ge=1)
    """Steps with a non-finite loss or gradient are skipped; training stops after this many in a row."""

    evaluation: Validation = Validation()
    """Evaluation on held-out rows."""

    @model_validator(mode="after")
    def _passes_fit_a_step(self) -> Self:
        if self.tokens_per_pass > self.tokens_per_step:
            raise ValueError(
                f"tokens_per_pass ({self.tokens_per_pass}) is more than tokens_per_step "
                f"({self.tokens_per_step}): lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _best_needs_validation(self) -> Self:
        held_out = self.data.split.validation or self.data.validation_files
        if (self.evaluation.keep_best or self.evaluation.patience) and not held_out:
            raise ValueError(
                "evaluation.keep_best and evaluation.patience need validation rows: "
                "add data.split=Split(validation=0.02) or data.validation_files"
            )
        return self
