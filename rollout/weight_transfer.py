"""How new weights enter a vLLM engine: vLLM's weight-transfer interface, fed with safetensors files by path.

vLLM loads this through the `vllm.general_plugins` entry point in every process that holds a model, which is why the
distribution must be installed there. The file lies in shared memory; only its path travels to the engine's process.
Weights arrive in the format of a Hugging Face checkpoint, so vLLM's layerwise reload applies them as it would at start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKENDS = {"object_store": "r2vpo_file", "nccl": "r2vpo_nccl"}
"""Of each weight transport the name that vLLM knows it by."""


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Nothing is negotiated: files need no rendezvous."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """One bucket of an update."""

    path: str
    """A safetensors file with tensors under their Hugging Face names."""


class FileWeightTransfer(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Loads buckets of weights from safetensors files."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Nothing to prepare."""

    def start_weight_update(self) -> None:
        """Bring every layer back into the form in which checkpoints are loaded."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket. The base class ends in an accelerator synchronisation, which a CPU does not have."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Hand the file's tensors to the model's own loader."""
        cast("Loadable", self.model).load_weights(load_file(update_info.path, device=str(self.device)).items())

    def finish_weight_update(self) -> None:
        """Process the loaded layers for the kernels, then point a tied output head at the new embedding."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.model_config.hf_text_config.tie_word_embeddings:
            tie_output_head(self.model)

    def shutdown(self) -> None:
        """Nothing is held open."""


class Loadable(Protocol):
    """What every model of vLLM can do."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> object:
        """Put tensors under their Hugging Face names where they belong."""
        ...


def tie_output_head(model: torch.nn.Module) -> None:
    """Make the output head use the embedding's current matrix.

    The layerwise reload restores the two as separate layers, and on CPU the head keeps the matrix that it had packed
    for its kernel: without this a tied model silently goes on sampling from its old head, two to four nats off.
    """
    heads = [m for m in model.modules() if isinstance(m, ParallelLMHead)]
    embeddings = [
        m for m in model.modules() if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead)
    ]
    for head in heads:
        shape = _matrix(head).shape
        twins = [e for e in embeddings if _matrix(e).shape == shape]
        if len(twins) != 1:
            raise ValueError(
                f"a tied output head of shape {tuple(shape)} needs exactly one embedding of that shape, "
                f"found {len(twins)}: this model's weights cannot be updated while it generates"
            )
        head.weight = twins[0].weight
        head.quant_method.process_weights_after_loading(head)


def _matrix(layer: torch.nn.Module) -> torch.Tensor:
    assert isinstance(layer.weight, torch.Tensor)
    return layer.weight


def register() -> None:
    """Entry point for vLLM: make the backends known, once per process."""
    if BACKENDS["object_store"] not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKENDS["object_store"], FileWeightTransfer)
        # By name: it is imported only where it is used.
        WeightTransferEngineFactory.register_engine(
            BACKENDS["nccl"], "rollout.nccl_transfer", class_name="NcclWeightTransfer"
        )
