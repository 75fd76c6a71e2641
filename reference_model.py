"""The model to be matched: `nn.BatchNorm2d`, at the size of KernelBench level 1, problem 33."""

import torch
import torch.nn as nn


class Model(nn.Module):
    """y = gamma·(x − mean)/√(var + eps) + beta, with mean and var per channel over N, H and W."""

    def __init__(self, num_features: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(num_features=num_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(x)


batch_size = 64
features = 64
dim1 = 512
dim2 = 512


def get_inputs():
    return [torch.rand(batch_size, features, dim1, dim2)]


def get_init_inputs():
    return [features]
