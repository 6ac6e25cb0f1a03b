"""Class vectors -> conditioning: the Class-Encoder replaces the text encoder (section 3 of the paper).

    encoder_hidden_states(y) = reshape(W_2 (W_1 y + b_1)),  y one-hot; y = 0 is the null condition

docs/method.md, item 19.
"""

import copy

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config


class ClassEncoder(ModelMixin, ConfigMixin):
    """Affine, no activation: class vector (C) -> Linear(C, hidden) -> Linear(hidden, tokens * width, no bias).

    A class is a one-hot vector; the null condition of classifier-free guidance is the zero vector. The initialisation is
    that of Keras' Dense layers (Glorot uniform, zero bias), so the null condition starts as zeros.
    """

    @register_to_config
    def __init__(self, num_classes: int, tokens: int = 77, width: int = 1024, hidden: int = 500):
        super().__init__()
        self.linear_in = torch.nn.Linear(num_classes, hidden)
        self.linear_out = torch.nn.Linear(hidden, tokens * width, bias=False)
        for layer in (self.linear_in, self.linear_out):
            torch.nn.init.xavier_uniform_(layer.weight)
        torch.nn.init.zeros_(self.linear_in.bias)

    def forward(self, class_vectors: torch.Tensor) -> torch.Tensor:
        """(n, num_classes) float -> encoder_hidden_states (n, tokens, width)."""
        hidden_states = self.linear_out(self.linear_in(class_vectors))
        return hidden_states.view(-1, self.config.tokens, self.config.width)

    def table(self) -> torch.Tensor:
        """The condition of every class, then the null condition: (num_classes + 1, tokens, width)."""
        vectors = torch.eye(self.config.num_classes + 1, self.config.num_classes, device=self.device, dtype=self.dtype)
        return self(vectors)

    def tabulated(self) -> "ClassTable":
        """The same conditions as a `ClassTable`."""
        table = ClassTable(self.config.num_classes, self.config.tokens, self.config.width)
        table.conditions.data.copy_(self.table().detach())
        return table


class ClassTable(ModelMixin, ConfigMixin):
    """The Class-Encoder's output for every class, precomputed: all that sampling and fine-tuning need of a checkpoint.

    At SD 2.0's size and ten classes it has 0.9 M numbers, the Class-Encoder 39.4 M.
    """

    @register_to_config
    def __init__(self, num_classes: int, tokens: int = 77, width: int = 1024):
        super().__init__()
        self.conditions = torch.nn.Parameter(torch.zeros(num_classes + 1, tokens, width))

    def table(self) -> torch.Tensor:
        """The condition of every class, then the null condition: (num_classes + 1, tokens, width)."""
        return self.conditions

    def effective_rank(self) -> float:
        """exp of the entropy of the explained-variance ratios of the class residuals, at most num_classes - 1.

        Near 1 the classes differ along one direction only: the encoder has collapsed (docs/method.md, item 8).
        """
        classes = self.table()[:-1].detach().flatten(1).double()
        variances = torch.linalg.svdvals(classes - classes.mean(0)).square()
        ratios = variances / variances.sum().clamp(min=torch.finfo(torch.double).tiny)  # of equal classes: rank 1
        return float(torch.special.entr(ratios).sum().exp())


class ProjectedConditions(torch.nn.Module):
    """Replaces the key or value projection of a cross-attention: its output for every condition, computed once."""

    def __init__(self, projection: torch.nn.Module, table: torch.Tensor):
        super().__init__()
        self.register_buffer("projected", projection(table), persistent=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the table, (n, 1, 1) -> keys or values (n, tokens, inner width)."""
        return self.projected[rows.flatten()]


@torch.no_grad()
def with_projected_conditions(unet: UNet2DConditionModel, table: torch.Tensor) -> UNet2DConditionModel:
    """A UNet for sampling from few conditions: its `encoder_hidden_states` are rows of `table`, (n, 1, 1) integers.

    `table` is (num_classes + 1, tokens, width). All images of a class share their keys and values at every inference
    step; projecting 77 tokens for each image would be 8.5 % of SD 2.0's arithmetic. The result shares its weights with
    `unet`, which is unchanged; the projected values do not follow later changes of the weights.
    """
    table = table.to(unet.device, unet.dtype)
    shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    sampling_unet = copy.deepcopy(unet, shared)
    for module in list(sampling_unet.modules()):
        if getattr(module, "is_cross_attention", False):
            module.to_k = ProjectedConditions(module.to_k, table)
            module.to_v = ProjectedConditions(module.to_v, table)
    sampling_unet.takes_rows = True
    return sampling_unet
