"""Random weights as a new model has them, in place of those of vLLM's load format `dummy`.

vLLM's own lie within 0.001, norms too: a layer adds next to nothing to its input, the next token
hangs on the last one alone, and that two answers are equal would prove little. vLLM imports this
module in each process that loads the model, because `--worker-extension-cls` names a class of it.
"""

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

LIMIT = 0.035  # of an even distribution with a standard deviation of 0.02


class Extension:
    """Adds nothing to vLLM's worker: that it is named gets this module imported."""


@register_model_loader("dummy")
class NewModelLoader(DummyModelLoader):  # type: ignore[misc]
    """Norms of 1, everything else at random: the same weights in each process and run."""

    def load_weights(self, model: nn.Module, _model_config: ModelConfig) -> None:
        """Called by vLLM when the model's layers are there."""
        for seed, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                parameter.data.fill_(1)
            else:
                random = torch.Generator(device=parameter.device).manual_seed(seed)
                parameter.data.uniform_(-LIMIT, LIMIT, generator=random)
