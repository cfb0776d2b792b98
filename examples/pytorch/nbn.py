"""BatchNorm with a normalised weight and bias (NBN), the LR head, and CIFAR ResNets that use them.

NBN (arXiv 2501.03122) keeps a BatchNorm layer's weight and bias as unit directions times one learned
magnitude that all normalised layers of the last stage share. The LR ("logit rectification") head is a
BatchNorm1d over the class logits.
"""

import torch
import torch.nn.functional as F
from torch import nn

NORM_EPSILON = 1e-6  # added to the norm of the direction, after the square root
BATCH_NORM_EPSILON = 1e-5


class NormalizedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose effective weight is alpha * weight / (|weight| + 1e-6), and bias likewise.

    `scale_factor` is the network's shared parameter; only its element `index` acts on this layer.
    """

    def __init__(self, channels, scale_factor, index=0):
        super().__init__(channels, eps=BATCH_NORM_EPSILON)
        # Hidden in a list so that the shared parameter is registered once, at the top of the network.
        self._shared = [scale_factor]
        self._index = index
        # A bias of exactly zero has a gradient 1e6 times too large; start from a random direction.
        nn.init.normal_(self.bias, std=channels**-0.5)

    def forward(self, x):
        alpha = self._shared[0][self._index]
        weight = alpha * self.weight / (self.weight.norm() + NORM_EPSILON)
        bias = alpha * self.bias / (self.bias.norm() + NORM_EPSILON)
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x, self.running_mean, self.running_var, weight, bias, self.training, self.momentum, self.eps
        )


class LogitRectification(nn.Module):
    """A linear classifier followed by BatchNorm1d over its logits."""

    def __init__(self, features, classes, affine):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features))
        self.bias = nn.Parameter(torch.zeros(classes))
        nn.init.kaiming_normal_(self.weight)
        self.bn = nn.BatchNorm1d(classes, affine=affine)

    def forward(self, x):
        return self.bn(F.linear(x, self.weight, self.bias))


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride, option, last_norm):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = last_norm(outputs)
        self.stride, self.pad = stride, outputs - inputs
        self.downsample = None
        if option == "B" and (stride != 1 or inputs != outputs):
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), last_norm(outputs)
            )

    def shortcut(self, x):
        if self.downsample is not None:
            return self.downsample(x)
        if self.stride == 1 and self.pad == 0:
            return x
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet-(6n+2) for 32x32 images.

    norm: "nbn" normalises bn2 (and the shortcut's BatchNorm) of every block of the last stage; "bn" none.
    head: "linear", "lr" (BatchNorm1d with weight and bias) or "lr-plain" (without).
    """

    def __init__(self, depth=20, classes=10, norm="nbn", head="linear", option="A", width=16):
        super().__init__()
        if depth % 6 != 2:
            raise ValueError(f"depth is {depth}; a CIFAR ResNet has 6n+2 layers: 20, 32, 44, 56 ...")
        if norm == "nbn":
            self.scale_factor = nn.Parameter(torch.ones(20))  # element 0 acts
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage in (1, 2, 3):
            outputs = width * 2 ** (stage - 1)
            normalised = norm == "nbn" and stage == 3
            last_norm = (
                (lambda c: NormalizedBatchNorm2d(c, self.scale_factor)) if normalised else nn.BatchNorm2d
            )
            blocks = []
            for block in range((depth - 2) // 6):
                stride = 2 if stage > 1 and block == 0 else 1
                blocks.append(BasicBlock(inputs, outputs, stride, option, last_norm))
                inputs = outputs
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        if head == "linear":
            self.fc = nn.Linear(inputs, classes)
        else:
            self.fc = LogitRectification(inputs, classes, affine=head == "lr")
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))
