"""Writes small checkpoints as public code bases save them: key names, shapes, wrapper, and that network's own logits.

    python tests/oracle/field_checkpoints.py OUT [--only NAME,...] [--tiny]

It needs torch, numpy, safetensors, transformers and timm.

OUT/NAME.pth (or as that code base calls it) is the checkpoint. OUT/NAME.npz has `x`, f32, and `y`, the logits in eval
mode, computed in f64. OUT/table.json lists them; `expect` says what an exporter should do with the file: "export",
"refuse", or "flag" where the file alone does not determine the network and `flags` says in words what must be told.
`--tiny` makes a quarter of the channels and two small pictures: the fixtures in tests/data/checkpoints/field are
    python tests/oracle/field_checkpoints.py tests/data/checkpoints/field --tiny --only $(cat tests/oracle/field_fixtures.txt)

OUT/unreadable has files that are no checkpoint of a network. OUT/lookalike has networks with the names and shapes of a
plain ResNet that compute something else.

Key names and formulas are those of the named repositories, as of 2020 to 2026; the code is our own. Several of them
pool with AvgPool2d(7), which is global for 224x224 pixels and fails for fewer; here the pool is global.
"""

import argparse
import collections
import copy
import datetime
import gzip
import io
import json
import pathlib
import pickle
import random
import sys
import tarfile
import types
import warnings
import zipfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

ENTRIES = {}
# Trained on GPUs only: their storages carry the place "cuda:0".
ON_CUDA = {
    "LDAM-DRW", "MiSLAS", "classifier-balancing", "BALMS", "RIDE", "PaCo", "ProCo", "pytorch-cifar", "BagofTricks-LT",
}
TINY = "--tiny" in sys.argv


def scaled(*widths):
    return tuple(width // 4 for width in widths) if TINY else widths


def depth(*blocks):
    return (1,) * len(blocks) if TINY else blocks


WIDTHS = scaled(8, 16, 32, 64)


# The networks.

class Blur(nn.Module):
    """An anti-aliasing filter [1 2 1]/4 in both directions, then every second pixel. It leaves no key."""

    def forward(self, x):
        line = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype) / 4
        kernel = (line[:, None] * line).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), kernel, stride=2, groups=x.shape[1])


class Block(nn.Module):
    """A basic or bottleneck block. The shortcut of option A, or of equal shapes, has no key.

    shortcut: its name. option: "A", "B", or of A's other forms "A appended" (zeros after the channels) and "A mean"
    (means of 2x2 pixels). stride_on: the convolution of a bottleneck that has the stride.
    """

    def __init__(self, inputs, planes, stride, bottleneck=False, shortcut="downsample", option="B", groups=1,
                 group_width=64, stride_on=2, dilation=1, blur=False, eps=1e-5, activation=F.relu, preact=False):
        super().__init__()
        outputs = planes * 4 if bottleneck else planes
        width = int(planes * group_width / 64) * groups if bottleneck else planes
        first = stride if not bottleneck or stride_on == 1 else 1
        self.blur = Blur() if blur and stride > 1 else None
        strides = (1, 1) if self.blur else (first, stride // first)
        three = lambda i, stride, groups=1, d=1: nn.Conv2d(i, width, 3, stride, d, d, groups, bias=False)  # noqa: E731
        norm = lambda channels: nn.BatchNorm2d(channels, eps=eps)  # noqa: E731
        if bottleneck:
            steps = [nn.Conv2d(inputs, width, 1, strides[0], bias=False), norm(width),
                     three(width, strides[1], groups, dilation), norm(width),
                     nn.Conv2d(width, outputs, 1, bias=False), norm(outputs)]
        else:
            steps = [three(inputs, strides[0], 1, dilation), norm(width), three(width, 1), norm(width)]
        if preact:
            steps = [norm(inputs), steps[0], norm(width), steps[2]]
        for index, step in enumerate(steps):
            kind = "conv" if isinstance(step, nn.Conv2d) else "bn"
            self.add_module(f"{kind}{index // 2 + 1}", step)
        projection = nn.Sequential() if shortcut == "shortcut" else None
        differs = stride != 1 or inputs != outputs
        if differs and option == "B":
            projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            if not preact:
                projection.append(norm(outputs))
        setattr(self, shortcut, projection)
        self.names = (shortcut, option if differs else "")
        self.sizes = (stride, outputs - inputs)
        self.activation, self.bottleneck, self.preact = activation, bottleneck, preact

    def past(self, x):
        name, option = self.names
        stride, more = self.sizes
        if option == "B":
            return getattr(self, name)(x)
        if option == "":
            return x
        x = F.avg_pool2d(x, 2) if option == "A mean" else x[:, :, ::stride, ::stride]
        before = 0 if option == "A appended" else more // 2
        return F.pad(x, (0, 0, 0, 0, before, more - before))

    def forward(self, x):
        act = self.activation
        if self.preact:
            y = act(self.bn1(x))
            past = self.past(y) if self.names[1] else x
            return self.conv2(act(self.bn2(self.conv1(y)))) + past
        y = act(self.bn1(self.conv1(x)))
        if self.bottleneck:
            y = act(self.bn2(self.conv2(y)))
            y = self.bn3(self.conv3(self.blur(y) if self.blur else y))
        else:
            y = self.bn2(self.conv2(self.blur(y) if self.blur else y))
        return act(y + self.past(x))


def stage(inputs, planes, blocks, stride, **style):
    made = []
    for index in range(blocks):
        made.append(Block(inputs, planes, stride if index == 0 else 1, **style))
        inputs = planes * (4 if style.get("bottleneck") else 1)
    return nn.Sequential(*made), inputs


class Body(nn.Module):
    """From images to features [N, C]. Stem "imagenet": 7x7, stride 2, and a max-pool; "cifar": 3x3, stride 1."""

    def __init__(self, planes=WIDTHS, blocks=(1, 1, 1, 1), stem="imagenet", max_pool=True, pool="mean",
                 strides=(1, 2, 2, 2), **style):
        super().__init__()
        eps = style.get("eps", 1e-5)
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(3, planes[0], 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0], eps=eps)
        inputs, dilation = planes[0], style.pop("dilation", 1)
        for index, (plane, count) in enumerate(zip(planes, blocks)):
            last = {"dilation": dilation} if index == len(planes) - 1 else {}
            layer, inputs = stage(inputs, plane, count, strides[index], **last, **style)
            setattr(self, f"layer{index + 1}", layer)
        self.features, self.stages, self.pool = inputs, len(planes), pool
        self.max_pool = large and max_pool
        self.activation, self.blur = style.get("activation", F.relu), Blur() if style.get("blur") else None

    def maps(self, x):
        x = self.activation(self.bn1(self.conv1(x)))
        if self.max_pool:
            x = self.blur(F.max_pool2d(x, 3, 1, 1)) if self.blur else F.max_pool2d(x, 3, 2, 1)
        for index in range(self.stages):
            x = getattr(self, f"layer{index + 1}")(x)
        return x

    def forward(self, x):
        x = self.maps(x)
        return x.mean((2, 3)) if self.pool == "mean" else x.amax((2, 3))


def cifar(width=scaled(8)[0], blocks=depth(2, 2, 2), option="A", **style):
    return Body((width, 2 * width, 4 * width), blocks, "cifar", shortcut="shortcut", option=option, **style)


class NormedLinear(nn.Module):
    """s * cos, weight [C, K]."""

    def __init__(self, features, classes, s=1):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, classes))
        self.s = s

    def forward(self, x):
        return self.s * (F.normalize(x, dim=1) @ F.normalize(self.weight, dim=0))


class Cosine(nn.Module):
    """s * cos, weight [K, C]; of LDAM in BagofTricks-LT (s in the loss), with a bias that nothing reads if `unused`.

    squashed: of classifier-balancing, where the features keep a length of n / (1 + n).
    """

    def __init__(self, features, classes, s=1, squashed=False, unused=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features))
        if unused:
            self.bias = nn.Parameter(torch.empty(classes))
        self.s, self.squashed = s, squashed

    def forward(self, x):
        if not self.squashed:
            return self.s * F.linear(F.normalize(x), F.normalize(self.weight))
        length = x.norm(dim=1, keepdim=True)
        unit = self.weight / self.weight.norm(dim=1, keepdim=True)
        return self.s * F.linear(length / (1 + length) * (x / length), unit)


class Scaled(nn.Module):
    """Learnable weight scaling, (W f + b) * scale, the bias too. scales [K] or, of MiSLAS, learned_norm [1, K]."""

    def __init__(self, features, classes, name="scales"):
        super().__init__()
        self.fc = nn.Linear(features, classes)
        self.name = name
        shape = (classes,) if name == "scales" else (1, classes)
        self.scale = nn.ParameterDict({name: nn.Parameter(torch.empty(shape))})

    def forward(self, x):
        return self.fc(x) * self.scale[self.name]


class Net(nn.Module):
    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x):
        return self.head(self.body(x))


def net(body, classes, head=nn.Linear, **arguments):
    return Net(body, head(body.features, classes, **arguments))


class Experts(Body):
    """RIDE: the stages up to `shared` once, the others and the classifier once an expert; the mean of their logits.

    early_exit: the "expert assignment" stage, which asks after each expert whether the next one is to run.
    """

    def __init__(self, planes, blocks, classes, stem, shared, experts=3, head=nn.Linear, early_exit=False, **style):
        super().__init__(planes[:shared], blocks[:shared], stem, **style)
        inputs = self.features
        for index in range(shared, len(planes)):
            made = [stage(inputs, planes[index], blocks[index], 2, **style) for _ in range(experts)]
            setattr(self, f"layer{index + 1}s", nn.ModuleList(layer for layer, _ in made))
            inputs = made[0][1]
        self.linears = nn.ModuleList(head(inputs, classes) for _ in range(experts))
        self.later, self.early_exit = range(shared, len(planes)), early_exit
        if early_exit:
            self.expert_help_pred_hidden_fcs = nn.ModuleList(nn.Linear(inputs, 16) for _ in range(experts - 1))
            self.expert_help_pred_fc = nn.Linear(16 + 5, 1)

    def each(self, x):
        """Features and logits of each expert."""
        trunk, outputs = self.maps(x), []
        for e, linear in enumerate(self.linears):
            x = trunk
            for index in self.later:
                x = getattr(self, f"layer{index + 1}s")[e](x)
            outputs.append((x.mean((2, 3)), linear(x.mean((2, 3)))))
        return outputs

    def asked(self, outputs, e):
        """Positive where expert `e` is to run."""
        total = sum(logits for _, logits in outputs[:e])
        unit = F.normalize(outputs[e - 1][0], dim=1)
        hidden = F.relu(self.expert_help_pred_hidden_fcs[e - 1](unit))
        return self.expert_help_pred_fc(torch.cat((torch.topk(total / e, 5, dim=1)[0], hidden), 1))[:, 0]

    def used(self, x):
        """How many experts each picture uses, [N, 1], and the mean of those."""
        outputs = self.each(x)
        total, used = outputs[0][1], torch.ones(len(x), 1, dtype=x.dtype)
        going = torch.ones(len(x), dtype=torch.bool)
        for e in range(1, len(outputs)):
            going &= self.asked(outputs, e) > 0
            total, used = total + going[:, None] * outputs[e][1], used + going[:, None]
        return used, total / used

    def mean(self, x):
        return torch.stack([logits for _, logits in self.each(x)], 1).mean(1)

    def forward(self, x):
        return self.used(x)[1] if self.early_exit else self.mean(x)


@torch.no_grad()
def lively(module, seed):
    """Parameters and statistics such as a long training leaves, of which each matters to the logits."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda t, low, high: t.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)  # noqa: E731
    normal = lambda t, std: t.copy_(torch.randn(t.shape, generator=generator) * std)  # noqa: E731
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            normal(part.weight, (2 / part.weight[0].numel()) ** 0.5)
        elif isinstance(part, (nn.BatchNorm2d, nn.BatchNorm1d)):
            normal(part.running_mean, 0.3)
            uniform(part.running_var, 0.5, 2)
            uniform(part.weight, 0.3, 1.2)
            part.weight[::7] *= -1
            normal(part.bias, 0.3)
            part.num_batches_tracked.fill_(1234)
        else:
            for name, parameter in part.named_parameters(recurse=False):
                if name in ("scales", "learned_norm", "weight_g", "original0"):
                    uniform(parameter, 0.5, 1.5)
                else:
                    normal(parameter, 0.5 if name == "bias" else 0.3)
    return module.eval()


def images(side, seed):
    """Four that differ in colour, contrast and shapes, so that the logits do."""
    side = min(side, 32) if TINY else side
    generator = torch.Generator().manual_seed(10_000 + seed)
    noise, coarse, colour = (torch.randn(4, 3, n, n, generator=generator) for n in (side, 4, 1))
    coarse = F.interpolate(coarse, size=side, mode="bilinear")
    return (noise * torch.tensor([0.1, 0.5, 1.0, 2.0]).view(4, 1, 1, 1) + coarse + colour)[:2 if TINY else 4]


# How checkpoints are put together.

def assemble(parts):
    """The modules, parameters and buffers at these dotted paths, as that code base's classes would nest them."""
    parts = dict(parts)
    root = parts.pop("", None) or nn.Module()
    for path, part in parts.items():
        *parents, name = path.split(".")
        node = root
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, nn.Module())
            node = getattr(node, parent)
        if isinstance(part, nn.Module):
            node.add_module(name, part)
        elif isinstance(part, nn.Parameter):
            node.register_parameter(name, part)
        else:
            node.register_buffer(name, part)
    return root


def plain(network, prefix="", fc="fc"):
    """Torchvision's names, or `fc` for the classifier, behind a prefix of whole modules."""
    root = assemble({prefix: network.body, ".".join(filter(None, (prefix, fc))): network.head})
    return root.state_dict()


def sgd(*modules):
    """An optimiser as training leaves it: a buffer for each parameter."""
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    optimizer.param_groups[0].update(lr=0.1, weight_decay=5e-4)
    return optimizer


def averaged_state(network):
    averaged = AveragedModel(assemble({"": network.body, "fc": network.head}))
    averaged.n_averaged.fill_(25)
    return averaged.state_dict()


SCALER = {
    "scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 7,
}


def foreign(path, bases=(object,), **members):
    """A class that pickles under another package's name."""
    module, name = path.rsplit(".", 1)
    names = module.split(".")
    for depth in range(len(names)):
        here = ".".join(names[:depth + 1])
        sys.modules.setdefault(here, types.ModuleType(here))
    made = type(name, bases, {"__module__": module, **members})
    setattr(sys.modules[module], name, made)
    return made


def with_attributes(made, **attributes):
    thing = made.__new__(made)
    if isinstance(thing, nn.Module):
        nn.Module.__init__(thing)
    for name, value in attributes.items():
        setattr(thing, name, value)
    return thing


def set_both(self, name, value):
    dict.__setitem__(self, name, value)
    self.__dict__[name] = value


# easydict keeps each item as an attribute too, so that both are pickled; yacs keeps three fields beside its items.
EasyDict = foreign("easydict.EasyDict", (dict,), __setattr__=set_both, __setitem__=set_both)
CfgNode = foreign("yacs.config.CfgNode", (dict,))
AttributeDict = foreign("pytorch_lightning.utilities.parsing.AttributeDict", (dict,))
HistoryBuffer = foreign("mmengine.logging.history_buffer.HistoryBuffer")
ConfigParser = foreign("parse_config.ConfigParser")
ProCoLoss = foreign("loss.proco.ProCoLoss", (nn.Module,))
EstimatorCV = foreign("loss.proco.EstimatorCV")


def easy(items):
    made = EasyDict()
    for key, value in items.items():
        made[key] = easy(value) if isinstance(value, dict) else value
    return made


def cfg_node(items):
    made = CfgNode((key, cfg_node(value) if isinstance(value, dict) else value) for key, value in items.items())
    made.__dict__.update({"__immutable__": True, "__deprecated_keys__": set(), "__renamed_keys__": {}})
    return made


CONFIG = {"backbone": {"type": "res32_cifar", "frozen": False}, "lr": 0.1, "steps": [160, 180], "name": "im100"}


def ride_config(arch, **arguments):
    save = pathlib.PosixPath("saved")
    return with_attributes(
        ConfigParser,
        _config={"name": "Imbalance_CIFAR100_LT_RIDE", "n_gpu": 1, "arch": {"type": arch, "args": arguments},
                 "optimizer": {"type": "SGD", "args": {"lr": 0.1, "momentum": 0.9, "nesterov": True}},
                 "trainer": {"epochs": 200, "save_dir": "saved", "monitor": "max val_accuracy", "tensorboard": True}},
        resume=None, load_crt=None, _save_dir=save / "models" / "RIDE" / "1129_093222",
        _log_dir=save / "log" / "RIDE" / "1129_093222", log_levels={0: 30, 1: 20, 2: 10},
    )


def ride_wrapper(model, arch, prefix="backbone", **arguments):
    return {
        "arch": "DataParallel" if prefix.startswith("module") else arch, "epoch": 200,
        "state_dict": assemble({prefix: model}).state_dict(), "optimizer": sgd(model).state_dict(),
        "monitor_best": np.float64(0.4812), "config": ride_config(arch, **arguments),
    }


def proco_criterion(classes, dim):
    generator = torch.Generator().manual_seed(3)
    estimator = lambda: with_attributes(  # noqa: E731
        EstimatorCV, class_num=classes, feature_num=dim, Amount=torch.full((classes,), 40.0),
        Ave=F.normalize(torch.randn(classes, dim, generator=generator)) * 0.9,
        kappa=torch.ones(classes) * dim * 90 / 19, logc=torch.ones(classes, dtype=torch.float64),
    )
    return with_attributes(ProCoLoss, temperature=0.1, num_classes=classes, feature_num=dim,
                           estimator_old=estimator(), estimator=estimator())


def entry(name, suffix, code_base, note, expect="export", flags=()):
    """Registers a function from a seed to what is saved, the networks by their names in the .npz, and the side of x."""
    def register(make):
        ENTRIES[name] = (make, suffix, code_base, note, expect, list(flags))
        return make
    return register


# LDAM-DRW, akamaster, kuangliu.

def cifar_entry(name, suffix, code_base, note, build, wrap, expect="export", flags=(), side=32):
    @entry(name, suffix, code_base, note, expect, flags)
    def make(seed):
        network = lively(build(), seed)
        return wrap(network), {"y": network}, side


def ldam(network, arch="resnet32", prefix=""):
    return {"epoch": 200, "arch": arch, "state_dict": plain(network, prefix, "linear"),
            "best_acc1": torch.tensor(70.31), "optimizer": sgd(network).state_dict()}


cifar_entry("ldam_resnet32_linear", ".pth.tar", "LDAM-DRW", "one GPU: no prefix",
            lambda: net(cifar(blocks=depth(5, 5, 5)), 10), ldam)
cifar_entry("ldam_resnet32_linear_module", ".pth.tar", "LDAM-DRW", "DataParallel",
            lambda: net(cifar(blocks=depth(5, 5, 5)), 10), lambda n: ldam(n, prefix="module"))
cifar_entry("ldam_resnet32_normed", ".pth.tar", "LDAM-DRW",
            "weight [C, K]; y are bare cosines: LDAMLoss multiplies by 30, the forward pass does not, so that their "
            "softmax is nearly uniform",
            lambda: net(cifar(blocks=depth(5, 5, 5)), 10, NormedLinear), ldam)
cifar_entry("akamaster_option_b", ".th", "pytorch_resnet_cifar10", "shortcut.0/1, DataParallel",
            lambda: net(cifar(option="B"), 10),
            lambda n: {"epoch": 200, "state_dict": plain(n, "module", "linear"), "best_prec1": torch.tensor(91.7)})
cifar_entry("akamaster_option_a", ".th", "pytorch_resnet_cifar10", "the published files: no epoch, DataParallel",
            lambda: net(cifar(), 10),
            lambda n: {"state_dict": plain(n, "module", "linear"), "best_prec1": 92.63})


def kuangliu(network):
    return {"net": plain(network, "module", "linear"), "acc": 95.47, "epoch": 199}


cifar_entry("kuangliu_resnet18", ".pth", "pytorch-cifar",
            "four stages behind a 3x3 stem without max-pool, shortcut.0/1",
            lambda: net(Body(blocks=depth(2, 2, 2, 2), stem="cifar", shortcut="shortcut"), 10), kuangliu)
cifar_entry("kuangliu_resnet50", ".pth", "pytorch-cifar", "the same with bottlenecks",
            lambda: net(Body(blocks=depth(1, 2, 1, 1), stem="cifar", shortcut="shortcut", bottleneck=True), 10), kuangliu)
cifar_entry("kuangliu_preact", ".pth", "pytorch-cifar",
            "pre-activation (PreActResNet18, and ResNet18 itself in the first versions): bn1 has the input's channels, "
            "shortcut.0 alone, no BatchNorm at the end",
            lambda: net(Body(blocks=depth(2, 2, 2, 2), stem="cifar", shortcut="shortcut", preact=True), 10), kuangliu,
            "refuse")


# MiSLAS. The Places variant has one more block (state_dict_block), whose place before the pool could not be read.

def mislas(name, note, body, prefix, side, classes=10):
    for number in (1, 2):
        @entry(f"mislas_{name}_stage{number}", ".pth.tar", "MiSLAS", note)
        def make(seed, number=number):
            network = lively(net(body(), classes, Scaled, name="learned_norm"), seed)
            if number == 1:
                network = Net(network.body, network.head.fc)
            at = lambda tail="": ".".join(filter(None, (prefix, tail)))  # noqa: E731
            head = network.head if number == 1 else network.head.fc
            saved = {"epoch": 200, "state_dict_model": assemble({prefix: network.body}).state_dict(),
                     "state_dict_classifier": assemble({at("fc"): head}).state_dict()}
            if number == 2:
                scale = network.head.scale["learned_norm"]
                saved["state_dict_lws_model"] = assemble({at("learned_norm"): scale}).state_dict()
            saved |= {"best_acc1": torch.tensor(46.25), "its_ece": np.float64(5.61)}
            return saved, {"y": network}, side


mislas("cifar", "DataParallel; the scale acts on the bias too", cifar, "module", 32)
mislas("cifar_bare", "one GPU: no prefix", cifar, "", 32)
mislas("imagenet", "torchvision's names; DataParallel", lambda: Body(bottleneck=True), "module", 64, 9)


# classifier-balancing (cRT, LWS, cosine, tau); BALMS has the same wrapper and does not save its meta learner.

def balancing(name, code_base, note, body, head=nn.Linear, latest=False, side=64, **arguments):
    @entry(name, ".pth", code_base, note)
    def make(seed):
        network = lively(net(body(), 9, head, **arguments), seed)
        parts = {"module.fc": network.head}
        if head is Scaled:
            parts = {"module.scales": network.head.scale["scales"], "module.fc": network.head.fc}
        elif head is Cosine:
            parts = {"module": network.head}
        weights = {"feat_model": collections.OrderedDict(), "classifier": assemble(parts).state_dict()}
        weights["feat_model"] = copy.deepcopy(assemble({"module": network.body}).state_dict())
        if latest:
            return {"epoch": 90, "state_dict": weights}, {"y": network}, side
        saved = {"epoch": 90, "best_epoch": 88, "state_dict_best": weights, "best_acc": 0.4417, "centroids": None}
        return saved, {"y": network}, side


RESNEXT = {"bottleneck": True, "groups": 4, "group_width": 32}
balancing("cb_resnet10_plain", "classifier-balancing", "ResNet-10", lambda: Body())
balancing("cb_resnet10_crt_latest", "classifier-balancing", "latest_model_checkpoint.pth", lambda: Body(), latest=True)
balancing("cb_resnext_plain", "classifier-balancing", "ResNeXt, stride on conv2", lambda: Body(**RESNEXT))
balancing("cb_resnext_lws", "classifier-balancing",
          "LWS, defined in TauNormClassifier.py; the scales act on the bias too", lambda: Body(**RESNEXT), Scaled)
balancing("cb_resnet10_cosine", "classifier-balancing",
          "weight [K, C]; 16 n/(1+n) cos, with n the features' length, which is no plain cosine", lambda: Body(),
          Cosine, s=16, squashed=True)
balancing("balms_resnet10", "BALMS", "ImageNet-LT", lambda: Body())
balancing("balms_resnet32", "BALMS", "CIFAR: ResNet-32's names, option A", cifar, side=32)
balancing("balms_resnet32_crt_latest", "BALMS", "cRT, latest_model_checkpoint.pth", cifar, side=32, latest=True)


@entry("cb_tau_norm", ".pth", "classifier-balancing",
       "tau_norm.py reads a plain checkpoint, divides each row by its length to the power tau (here 0.7), leaves the "
       "bias out, and saves nothing. This is what somebody who keeps the result would save")
def cb_tau_norm(seed):
    network = lively(net(Body(), 9), seed)
    weight = network.head.weight.data
    network.head.weight.data = weight / weight.norm(dim=1, keepdim=True) ** 0.7
    network.head.bias = None
    weights = {"feat_model": assemble({"module": network.body}).state_dict(),
               "classifier": assemble({"module.fc": network.head}).state_dict()}
    return {"epoch": 90, "best_epoch": 88, "state_dict_best": weights, "best_acc": 0.4417}, {"y": network}, 64


# BagofTricks-LT: `module` is DataParallel's; the network's own member of that name, the pool, has no key.

def bag_of_tricks(name, note, body, head=nn.Linear, side=32, expect="export", flags=(), **arguments):
    @entry(name, ".pth", "BagofTricks-LT", note, expect, flags)
    def make(seed):
        network = lively(net(body(), 9, head, **arguments), seed)
        parts = {"module.backbone": network.body, "module.classifier": network.head}
        if head is Scaled:
            del parts["module.classifier"]
            parts |= {"module.classifier.scales": network.head.scale["scales"], "module.classifier.fc": network.head.fc}
        optimizer = sgd(network)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [160, 180])
        saved = {"state_dict": assemble(parts).state_dict(), "epoch": 200, "best_result": 0.4231, "best_epoch": 190,
                 "scheduler": scheduler.state_dict(), "optimizer": optimizer.state_dict(), "amp": {}}
        return saved, {"y": network}, side


bag_of_tricks("bag_fc", "FC", cifar)
bag_of_tricks("bag_fc_no_bias", "FC without bias: the same keys and shapes as bag_fc_norm", cifar, bias=False)
bag_of_tricks("bag_fc_norm", "FCNorm, for LDAM: weight [K, C], bare cosines (the loss has the scale); the same keys "
              "and shapes as bag_fc_no_bias", cifar, Cosine, expect="flag", flags=["head is a cosine"])
bag_of_tricks("bag_lws", "LWS, ImageNet names", lambda: Body(bottleneck=True), Scaled, side=64)


# RIDE.

def ride(name, note, arch, prefix="backbone", side=32, classes=10, early_exit=False, **arguments):
    expect, flags = ("refuse", ["the mean of all experts (y_all) is meant"]) if early_exit else ("export", [])

    @entry(name, ".pth", "RIDE", note, expect, flags)
    def make(seed):
        model = lively(Experts(classes=classes, early_exit=early_exit, **arguments), seed)
        networks = {"y": model}
        if early_exit:
            # Half of the pictures leave after the first expert.
            with torch.no_grad():
                asked = model.asked(model.each(images(side, seed)), 1).sort()[0]
                half = len(asked) // 2
                model.expert_help_pred_fc.bias -= (asked[half - 1] + asked[half]) / 2
            networks |= {"y_all": model.mean, "experts": lambda x: model.used(x)[0]}
        return ride_wrapper(model, arch, prefix, num_classes=classes, num_experts=3), networks, side


SMALL = {"stem": "cifar", "shared": 1, "shortcut": "shortcut", "option": "A", "blocks": depth(2, 2, 2)}
NORMED = {"head": lambda features, classes: NormedLinear(features, classes, 30)}
ride("ride_cifar_linear", "three experts", "ResNet32Model", planes=scaled(8, 16, 32), **SMALL)
ride("ride_cifar_linear_module", "the same from several GPUs: arch is DataParallel", "ResNet32Model",
     "module.backbone", planes=scaled(8, 16, 32), **SMALL)
ride("ride_cifar_reduced",
     "reduce_dimension: 8, 12, 24 (as 16, 24, 48); option A adds half of the difference on each side", "ResNet32Model",
     planes=scaled(8, 12, 24), **SMALL)
ride("ride_cifar_normed", "use_norm: weights [C, K]; the forward pass multiplies by s = 30 (LDAM's own does not)",
     "ResNet32Model", planes=scaled(8, 12, 24), **SMALL, **NORMED)
LARGE = {"stem": "imagenet", "blocks": depth(1, 2, 1, 1), "bottleneck": True, "planes": scaled(8, 16, 24, 48)}
ride("ride_imagenet_reduced", "reduce_dimension: 8, 16, 24, 48 (as 64, 128, 192, 384)", "ResNet50Model", side=64,
     classes=9, shared=2, **LARGE)
ride("ride_imagenet_shared_normed",
     "reduce_dimension, share_layer3 (layer3 instead of layer3s), use_norm: s = 30 in the forward pass",
     "ResNet50Model", side=64, classes=9, shared=3, **LARGE, **NORMED)
ride("ride_resnext_reduced", "ResNeXt", "ResNeXt50Model", "module.backbone", side=64, classes=9, shared=2,
     **{**LARGE, **RESNEXT})
ride("ride_resnet10", "basic blocks", "ResNet10Model", side=64, classes=9, shared=2, stem="imagenet",
     blocks=(1, 1, 1, 1), planes=scaled(8, 16, 32, 64))
ride("ride_cifar_ea", "expert assignment: each picture uses one to three experts (`experts`); y is the mean of those, "
     "y_all the mean of all", "ResNet32EAModel", early_exit=True, planes=scaled(8, 12, 24), **SMALL)
ride("ride_imagenet_ea", "the same", "ResNet50EAModel", side=64, classes=9, early_exit=True, shared=2, **LARGE)


@entry("ride_one_expert", ".pth", "RIDE", "num_experts 1 is a plain network: backbone.layer2, backbone.linear; with "
       "the criterion's state beside, as some versions save it")
def ride_one_expert(seed):
    network = lively(net(cifar(), 10), seed)
    saved = ride_wrapper(network, "ResNet32Model", num_experts=1)
    saved["state_dict"] = plain(network, "backbone", "linear")
    saved["criterion"] = collections.OrderedDict(m_list=torch.rand(10), per_cls_weights=torch.rand(10))
    return saved, {"y": network}, 32


# PaCo, GPaCo, ProCo: a projection beside the classifier, which alone makes the logits.

def projection(features, inner, dim, norm=True, depth=2):
    layers = []
    for _ in range(depth - 1):
        layers += [nn.Linear(features, inner)] + ([nn.BatchNorm1d(inner)] if norm else []) + [nn.ReLU(inplace=True)]
        features = inner
    return nn.Sequential(*layers, nn.Linear(features, dim))


def paco(name, note, body, side, momentum=True, normalise=False, expect="export", folder=""):
    @entry(folder + name, ".pth.tar", "PaCo", note, expect, ["features are normalised"] if normalise else [])
    def make(seed):
        queries, keys = body(), body()
        features, dim, classes = queries.features, 16, 9
        network = lively(Net(queries, nn.Linear(features, classes)), seed)
        other = lively(Net(keys, nn.Linear(features, classes)), seed + 500)
        generator = torch.Generator().manual_seed(seed)
        made = [lively(projection(features, features, dim, momentum, 2 if momentum else 3), seed + i) for i in (1, 2)]
        parts = {"module.queue": F.normalize(torch.randn(32, dim, generator=generator), dim=0),
                 "module.queue_l": torch.randint(0, classes, (32,), generator=generator),
                 "module.queue_ptr": torch.tensor([16]),
                 "module.encoder_q": queries, "module.encoder_q.fc": made[0]}
        if momentum:
            parts |= {"module.encoder_k": keys, "module.encoder_k.fc": made[1]}
        parts["module.linear"] = network.head
        if momentum:
            parts["module.linear_k"] = other.head
        saved = {"epoch": 400, "arch": "resnet32" if side == 32 else "resnet50", "acc": torch.tensor(52.0),
                 "state_dict": assemble(parts).state_dict(), "optimizer": sgd(network).state_dict()}
        logits = (lambda x: network.head(F.normalize(network.body(x), dim=1))) if normalise else network
        return saved, {"": network, "y": logits}, side


paco("paco_cifar", "logits: linear(encoder_q's features); encoder_q.fc is a projection; encoder_k and linear_k have "
     "other weights; ResNet-32 of twice the width", cifar, 32)
paco("paco_imagenet", "the same with torchvision's ResNet", lambda: Body(bottleneck=True), 64)
paco("gpaco_cifar", "no second encoder; projection of three layers without BatchNorm", cifar, 32, momentum=False)
paco("paco_normalize", "--normalize: features of length one before the classifier; nothing in the file says so", cifar,
     32, normalise=True, expect="refuse", folder="lookalike/")


def proco(name, note, body, head, inner, side, **arguments):
    @entry(name, ".pth.tar", "ProCo", note)
    def make(seed):
        network = lively(net(body(), 9, head, **arguments), seed)
        hidden = inner or network.body.features
        made = lively(projection(network.body.features, hidden, 24), seed + 1)
        model = assemble({"module.encoder": network.body, "module.head": made, "module.fc": network.head})
        saved = {"epoch": 200, "arch": "resnet32" if side == 32 else "resnet50", "state_dict": model.state_dict(),
                 "best_acc1": 52.8, "best_many": 70.1, "best_med": 53.0, "best_few": np.float64(30.9),
                 "optimizer": sgd(model).state_dict(), "criterion_scl": proco_criterion(9, 24)}
        return saved, {"y": network}, side


proco("proco_cifar_linear", "use_norm is off for CIFAR; criterion_scl is a whole module with two objects of tensors",
      cifar, nn.Linear, 40, 32)
proco("proco_cifar_normed", "fc.weight [C, K]; the layer itself multiplies by 30", cifar, NormedLinear, 40, 32, s=30)
proco("proco_imagenet_normed", "the same; use_norm is on for ImageNet", lambda: Body(bottleneck=True), NormedLinear,
      None, 64, s=30)


# Trainers that anybody uses.

def bottleneck_net(seed, **style):
    return lively(net(Body(blocks=depth(1, 2, 1, 1), bottleneck=True, **style), 9), seed)


def basic_net(seed, head=nn.Linear, classes=9, style=None, **arguments):
    return lively(net(Body(blocks=(1, 1, 1, 1), **(style or {})), classes, head, **arguments), seed)


@entry("plantnet300k_resnet50", ".tar", "PlantNet-300K", "named NAME_weights_best_acc.tar; trained from scratch with "
       "mean .4425 .4695 .3266 and std .2353 .2219 .2325")
def plantnet_50(seed):
    network = bottleneck_net(seed)
    return {"epoch": 27, "model": plain(network), "optimizer": sgd(network).state_dict()}, {"y": network}, 64


@entry("plantnet300k_resnet18", ".tar", "PlantNet-300K", "basic blocks")
def plantnet_18(seed):
    network = basic_net(seed)
    return {"epoch": 27, "model": plain(network), "optimizer": sgd(network).state_dict()}, {"y": network}, 64


def torchvision_trainer(seed, ema):
    network, smooth = basic_net(seed), basic_net(seed + 500)
    optimizer = sgd(network)
    schedulers = [torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=5),
                  torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 95)]
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, [5])
    arguments = argparse.Namespace(data_path="/data", model="resnet18", device="cuda", lr=0.1, epochs=90, amp=True)
    saved = {"model": plain(network), "optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict(),
             "epoch": 89, "args": arguments}
    if ema:
        saved["model_ema"] = averaged_state(smooth)
    saved["scaler"] = SCALER
    return saved, {"y": network, "y_ema": smooth} if ema else {"y": network}, 64


entry("torchvision_trainer", ".pth", "torchvision", "references/classification")(
    lambda seed: torchvision_trainer(seed, False))
entry("torchvision_trainer_ema", ".pth", "torchvision",
      "model (y) and model_ema (y_ema, n_averaged and module.) differ", "flag", ["weights: model or model_ema"])(
    lambda seed: torchvision_trainer(seed, True))


def timm_trainer(seed, ema=False, channels_last=False):
    network, smooth = bottleneck_net(seed), bottleneck_net(seed + 500)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    arguments = argparse.Namespace(model="resnet50", data_dir="/data", num_classes=9, mean=None, opt="sgd", lr=0.5)
    saved = {"epoch": 299, "arch": "resnet50", "optimizer": sgd(network).state_dict(), "version": 2, "args": arguments,
             "amp_scaler": SCALER, "state_dict": plain(network)}
    if ema:
        saved["state_dict_ema"] = plain(smooth)
    saved["metric"] = 61.2
    return saved, {"y": network, "y_ema": smooth} if ema else {"y": network}, 64


entry("timm_trainer", ".pth.tar", "timm", "train.py")(timm_trainer)
entry("timm_trainer_channels_last", ".pth.tar", "timm",
      "--channels-last: convolutions are stored with the strides of NHWC")(
    lambda seed: timm_trainer(seed, channels_last=True))
entry("timm_trainer_ema", ".pth.tar", "timm", "state_dict (y) and state_dict_ema (y_ema) differ", "flag",
      ["weights: state_dict or state_dict_ema"])(lambda seed: timm_trainer(seed, ema=True))


def lightning(seed, prefix, hyper_parameters, criterion=False):
    network = basic_net(seed)
    parts = {prefix: network.body, f"{prefix}.fc": network.head}
    if criterion:
        parts["criterion.weight"] = torch.rand(9, generator=torch.Generator().manual_seed(seed))
    score = torch.tensor(0.61)
    monitor = {"monitor": "val_acc", "best_model_score": score, "best_model_path": "epoch=9.ckpt",
               "current_score": score, "dirpath": "checkpoints", "best_k_models": {"epoch=9.ckpt": score},
               "kth_value": score}
    progress = {"total": {"ready": 100, "completed": 100}, "current": {"ready": 10, "completed": 10}}
    loop = {"state_dict": {}, "epoch_progress": progress, "epoch_loop.state_dict": {"_batches_that_stepped": 1000}}
    saved = {"epoch": 9, "global_step": 1000, "pytorch-lightning_version": "2.2.1",
             "state_dict": assemble(parts).state_dict(),
             "loops": {"fit_loop": loop, "validate_loop": {"state_dict": {}}},
             "callbacks": {"ModelCheckpoint{'monitor': 'val_acc', 'mode': 'max', 'every_n_epochs': 1}": monitor},
             "optimizer_states": [sgd(network).state_dict()], "lr_schedulers": [], "hparams_name": "kwargs",
             "hyper_parameters": hyper_parameters}
    return saved, {"y": network}, 64


entry("lightning_model", ".ckpt", "Lightning", "model. ; hyper_parameters are a dict")(
    lambda seed: lightning(seed, "model", {"lr": 0.1, "num_classes": 9, "backbone": "resnet18"}))
entry("lightning_net", ".ckpt", "Lightning", "net. ; hyper_parameters are Lightning's AttributeDict; the loss keeps "
      "the classes' weights in the state dict, as criterion.weight [K]")(
    lambda seed: lightning(seed, "net", AttributeDict(lr=0.1, num_classes=9), criterion=True))


def hugging_face(name, layer_type, sizes, safe, note, expect="export", flags=(), **options):
    @entry(name, "", "Hugging Face", note, expect, flags)
    def make(seed):
        from transformers import ResNetConfig, ResNetForImageClassification
        from transformers.utils.logging import disable_progress_bar
        disable_progress_bar()
        config = ResNetConfig(embedding_size=scaled(8)[0], hidden_sizes=list(scaled(*sizes)), depths=list(depth(1, 2, 1, 1)), layer_type=layer_type,
                              num_labels=9, **options)
        model = lively(ResNetForImageClassification(config), seed)

        def write(folder):
            model.save_pretrained(folder)
            if not safe:  # what save_pretrained wrote before safetensors
                torch.save(model.state_dict(), folder / "pytorch_model.bin")
                (folder / "model.safetensors").unlink()
            return folder / ("model.safetensors" if safe else "pytorch_model.bin")
        return write, {"y": lambda x: model(x).logits, "": model}, 64


hugging_face("hf_basic", "basic", [8, 16, 32, 64], True, "basic layers")
hugging_face("hf_basic_bin", "basic", [8, 16, 32, 64], False, "pytorch_model.bin")
hugging_face("hf_bottleneck", "bottleneck", [32, 64, 128, 256], True, "by default the stride is on the 3x3 convolution")
hugging_face("hf_bottleneck_bin", "bottleneck", [32, 64, 128, 256], False, "pytorch_model.bin")
hugging_face("lookalike/hf_stride_on_first", "bottleneck", [32, 64, 128, 256], True,
             "downsample_in_bottleneck: only config.json beside it says so", "refuse", ["the network's outputs"],
             downsample_in_bottleneck=True)


def mm_weights(network, prefix=""):
    return assemble({f"{prefix}backbone": network.body, f"{prefix}head.fc": network.head}).state_dict()


def mmcls(seed, ema=False):
    network, raw = bottleneck_net(seed), bottleneck_net(seed + 500)
    meta = {"mmcls_version": "0.25.0", "epoch": 100, "iter": 50000, "seed": 0, "hook_msgs": {},
            "env_info": "Python 3.8", "CLASSES": [f"class {i}" for i in range(9)],
            "config": "model = dict(type='ImageClassifier')\n"}
    weights = mm_weights(network)
    if ema:
        parameters = [(k, v) for k, v in mm_weights(raw).items() if k.endswith(("weight", "bias"))]
        weights.update((f"ema_{key.replace('.', '_')}", value) for key, value in parameters)
    saved = {"meta": meta, "state_dict": weights, "optimizer": sgd(network).state_dict()}
    return saved, {"y": network}, 64


def mmpretrain(seed, ema=False):
    network, raw = bottleneck_net(seed), bottleneck_net(seed + 500)
    meta = {"epoch": 100, "iter": 50000, "cfg": "model = dict(type='ImageClassifier')\n", "seed": 42,
            "time": "20260101_120000", "experiment_name": "resnet50", "mmengine_version": "0.10.4",
            "dataset_meta": {"classes": tuple("abcdefghi")}}
    history = with_attributes(HistoryBuffer, max_length=1000000, _log_history=np.linspace(0.1, 0.01, 5),
                              _count_history=np.ones(5, int))
    hub = {"log_scalars": collections.OrderedDict({"train/lr": history}),
           "runtime_info": collections.OrderedDict(epoch=99, iter=49999, max_epochs=100),
           "resumed_keys": collections.OrderedDict({"train/lr": True})}
    milestones = collections.Counter({30: 1, 60: 1})
    saved = {"meta": meta, "state_dict": mm_weights(network), "message_hub": hub,
             "optimizer": sgd(network).state_dict(),
             "param_schedulers": [{"by_epoch": True, "last_step": 100, "milestones": milestones}]}
    if ema:
        parts = {"steps": torch.tensor(50000), "module.backbone": raw.body, "module.head.fc": raw.head}
        saved["ema_state_dict"] = assemble(parts).state_dict()
    return saved, {"y": network, "y_ema": raw} if ema else {"y": network}, 64


entry("mmpretrain_resnet50", ".pth", "mmpretrain",
      "backbone., head.fc. ; message_hub has pickled HistoryBuffer objects")(mmpretrain)
entry("mmpretrain_resnet50_ema", ".pth", "mmpretrain",
      "EMAHook swaps: state_dict has the averaged weights (y), ema_state_dict the raw ones (y_ema, module.)", "flag",
      ["weights: state_dict or ema_state_dict"])(lambda seed: mmpretrain(seed, ema=True))
entry("mmcls_resnet50", ".pth", "mmcls", "backbone., head.fc. ; meta")(mmcls)
entry("mmcls_resnet50_ema", ".pth", "mmcls", "EMAHook keeps a second set in buffers: ema_backbone_conv1_weight", "flag",
      ["weights: without ema_"])(lambda seed: mmcls(seed, ema=True))


# Prefixes and heads that wrappers leave.

def prefixed(name, prefix, note, fc="fc"):
    @entry(name, ".pth", "PyTorch", note)
    def make(seed):
        network = basic_net(seed)
        return plain(network, prefix, fc), {"y": network}, 64


prefixed("plain_state_dict", "", "a state dict by itself")
prefixed("compiled", "_orig_mod", "torch.compile")
prefixed("compiled_then_ddp", "module._orig_mod", "DistributedDataParallel(torch.compile(model))")
prefixed("ddp_then_compiled", "_orig_mod.module", "torch.compile(DistributedDataParallel(model))")
prefixed("fsdp", "_fsdp_wrapped_module", "FullyShardedDataParallel around the whole")
prefixed("head_fc", "", "classifier head.fc", "head.fc")
prefixed("head_fc_1", "", "classifier Sequential(Dropout, Linear)", "fc.1")
prefixed("head_classifier", "", "classifier", "classifier")


@entry("fsdp_blocks", ".pth", "PyTorch", "each block wrapped too, one of them in an activation checkpoint as well")
def fsdp_blocks(seed):
    network = basic_net(seed)
    weights = collections.OrderedDict()
    for key, value in plain(network).items():
        parts = key.split(".")
        if parts[0].startswith("layer"):
            wrapped = ["_fsdp_wrapped_module"] + (["_checkpoint_wrapped_module"] if parts[0] == "layer2" else [])
            parts[2:2] = wrapped
        weights[".".join(["_fsdp_wrapped_module"] + parts)] = value
    return {"state_dict": weights, "epoch": 3}, {"y": network}, 64


@entry("swa", ".pth", "PyTorch", "torch.optim.swa_utils.AveragedModel's state dict: n_averaged, module.")
def swa(seed):
    network = basic_net(seed)
    return averaged_state(network), {"y": network}, 64


def normed_weights(seed, how):
    network = basic_net(seed)
    network.head = lively(how(nn.Linear(network.body.features, 9)), seed + 1)
    return plain(network), {"y": network}, 64


entry("weight_norm_old", ".pth", "PyTorch", "torch.nn.utils.weight_norm: fc.weight_g [K, 1], fc.weight_v; g v/|v|")(
    lambda seed: normed_weights(seed, nn.utils.weight_norm))
entry("weight_norm_new", ".pth", "PyTorch",
      "torch.nn.utils.parametrizations: fc.parametrizations.weight.original0 (g), original1 (v)")(
    lambda seed: normed_weights(seed, nn.utils.parametrizations.weight_norm))


@entry("head_no_bias", ".pth", "PyTorch", "a linear classifier without bias")
def head_no_bias(seed):
    network = basic_net(seed, bias=False)
    return plain(network), {"y": network}, 64


@entry("flat_views", ".pth", "PyTorch", "all weights are views into one storage, some of them transposed")
def flat_views(seed):
    network = basic_net(seed)
    weights = plain(network)
    floats = [k for k, v in weights.items() if v.is_floating_point()]
    flat = torch.cat([(weights[k].t() if k == "fc.weight" else weights[k]).reshape(-1) for k in floats])
    at = 0
    for key in floats:
        size, shape = weights[key].numel(), weights[key].shape
        part = flat[at:at + size]
        weights[key] = part.view(shape[1], shape[0]).t() if key == "fc.weight" else part.view(shape)
        at += size
    return weights, {"y": network}, 64


for kind, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64)):
    @entry(f"precision_{kind}", ".pth", "PyTorch", f"saved in {kind}; y is of the rounded weights")
    def precision(seed, dtype=dtype):
        network = basic_net(seed)
        with torch.no_grad():
            weights = plain(network)
            for key, value in weights.items():
                if value.is_floating_point():
                    value.copy_(value.to(dtype))
                    weights[key] = value.to(dtype)
        return {"model": weights}, {"y": network}, 64


@entry("plain_safetensors", "", "safetensors", "a state dict by itself")
def plain_safetensors(seed):
    network = basic_net(seed)

    def write(folder):
        folder.mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in plain(network).items()}, folder / "model.safetensors")
        return folder / "model.safetensors"
    return write, {"y": network}, 64


# Objects beside the weights, in both of torch.save's formats.

def beside_optimizer(network):
    optimizer = sgd(network)
    return {"optimizer": optimizer, "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)}


BESIDE = {
    "easydict": lambda n: {"cfg": easy(CONFIG), "epoch": 3},
    "cfgnode": lambda n: {"config": cfg_node(CONFIG), "epoch": 3},
    "defaultdict": lambda n: {"history": collections.defaultdict(list, {"loss": [1.5, 0.25]}),
                              "counts": collections.defaultdict(int, {"cat": 3})},
    "namespace": lambda n: {
        "args": argparse.Namespace(lr=0.1, arch="resnet18", gpus=[0, 1], inner=argparse.Namespace(a=None)),
    },
    "optimizer_object": beside_optimizer,
    "assorted": lambda n: {
        "acc": np.float64(0.5), "acc32": np.float32(0.25), "flag": np.bool_(True), "count": np.int64(7),
        "names": np.array(["a", "bc"]), "confusion": np.eye(3), "device": torch.device("cuda", 0),
        "size": torch.Size([1, 3, 64, 64]), "dtype": torch.float16, "day": datetime.date(2026, 1, 2),
        "time": datetime.datetime(2026, 1, 2, 3, 4, 5), "took": datetime.timedelta(seconds=5),
        "path": pathlib.PosixPath("runs/a"), "counter": collections.Counter("aab"),
        "deque": collections.deque([1, 2], maxlen=5), "set": {1, 2}, "frozen": frozenset("a"), "bytes": b"\x00\x01",
        "complex": 1 + 2j, "range": range(3), "slice": slice(1, 2), "none": None, "big": 1 << 80,
        "tuple": (1, (2.5, "x")), "ordered": collections.OrderedDict(a=1), "infinite": float("inf"),
        "rng": torch.Generator().manual_seed(0).get_state(), "numpy_rng": np.random.RandomState(0).get_state(),
        "python_rng": random.Random(0).getstate(), "parameter": nn.Parameter(torch.ones(2)),
    },
}
for kind in BESIDE:
    for legacy in ("", "_legacy"):
        @entry(f"beside_{kind}{legacy}", ".pth", "objects", "the format before torch 1.6" if legacy else "a zip file")
        def beside(seed, kind=kind):
            network = basic_net(seed)
            return {"state_dict": plain(network), **BESIDE[kind](network)}, {"y": network}, 64


@entry("beside_numpy_1_legacy", ".pth", "objects", "numpy scalars and arrays as numpy 1 names them (numpy.core)")
def beside_numpy_1(seed):
    network = basic_net(seed)

    def write(path):
        buffer = io.BytesIO()
        saved = {"state_dict": plain(network), "acc": np.float64(0.5), "confusion": np.eye(3)}
        torch.save(saved, buffer, _use_new_zipfile_serialization=False)
        path = path.with_suffix(".pth")
        path.write_bytes(buffer.getvalue().replace(b"cnumpy._core.", b"cnumpy.core."))
        return path
    return write, {"y": network}, 64


# Two sets of weights.

def two_sets(name, note, flags, wrap):
    @entry(name, ".pth", "two sets", note, "flag", flags)
    def make(seed):
        raw, smooth = basic_net(seed), basic_net(seed + 500)
        return wrap(raw, smooth), {"y": raw, "y_ema": smooth}, 64


two_sets("two_both_prefixes", "X (y) and module.X (y_ema) in one dict, differing", ["prefix: none or module."],
         lambda raw, smooth: {**plain(smooth, "module"), **plain(raw)})
two_sets("two_ema_beside", "state_dict (y) and ema (y_ema)", ["weights: state_dict or ema"],
         lambda raw, smooth: {"epoch": 3, "state_dict": plain(raw), "ema": plain(smooth)})
two_sets("two_swa_beside", "model (y) and swa_model (y_ema)", ["weights: model or swa_model"],
         lambda raw, smooth: {"model": plain(raw), "swa_model": averaged_state(smooth), "epoch": 3})
two_sets("two_ema_inside", "one state dict with model.X (y) and ema_model.X (y_ema), as of a Lightning module",
         ["prefix: model. or ema_model."],
         lambda raw, smooth: {"epoch": 3, "state_dict": {**plain(raw, "model"), **plain(smooth, "ema_model")}})
two_sets("two_student_teacher", "student (y) and teacher (y_ema)", ["weights: student or teacher"],
         lambda raw, smooth: {"student": plain(raw, "module"), "teacher": plain(smooth)})


# Look-alikes: a plain ResNet's names and shapes, another network.

def lookalike(name, note, fc="fc", head=nn.Linear, arguments=None, body=Body, side=64, classes=9, **style):
    @entry(f"lookalike/{name}", ".pth", "look-alike", note, "refuse", ["the network's outputs"])
    def make(seed):
        network = lively(net(body(**style), classes, head, **(arguments or {})), seed)
        return plain(network, fc=fc), {"y": network}, side


BOTTLENECKS = {"blocks": depth(1, 2, 1, 1), "bottleneck": True}
lookalike("resnetblur18", "blur pooling after conv1's activation and the max-pool, as timm's resnetblur18", blur=True)
lookalike("antialiased_bottleneck", "the same with bottlenecks, after conv2's activation", blur=True, **BOTTLENECKS)
lookalike("stride_on_conv1", "bottlenecks with the stride on their first convolution (ResNet v1, caffe style)",
          stride_on=1, **BOTTLENECKS)
lookalike("dilated", "the last stage dilated instead of strided (output stride 16)", strides=(1, 2, 2, 1), dilation=2)
lookalike("batch_norm_eps", "BatchNorm's epsilon is 1e-3", eps=1e-3)
lookalike("leaky_relu", "LeakyReLU(0.1)", activation=lambda x: F.leaky_relu(x, 0.1))
lookalike("silu", "SiLU", activation=F.silu)
lookalike("no_max_pool", "no max-pool behind the 7x7 stem", max_pool=False)
lookalike("max_pool_head", "maximum instead of mean over the last map", pool="max")
lookalike("cosine_unused_bias", "16 cos, with a bias that nothing reads", head=Cosine,
          arguments={"s": 16, "unused": True})
lookalike("cosine_no_bias", "16 cos, a weight [K, C] alone", head=Cosine, arguments={"s": 16})
lookalike("cifar_normed_times_30", "LDAM's NormedLinear with s = 30 in the forward pass, as forks have it", "linear",
          NormedLinear, {"s": 30}, cifar, 32)
lookalike("cifar_option_a_appended", "option A with the zeros after the channels", "linear", body=cifar, side=32,
          option="A appended")
lookalike("cifar_option_a_mean", "option A with means of 2x2 pixels", "linear", body=cifar, side=32, option="A mean")


# Files that are no checkpoint of a network, or that cannot be read without running them.

def unreadable(out):
    out.mkdir(parents=True, exist_ok=True)
    network = basic_net(1)
    model, image = assemble({"": network.body, "fc": network.head}).float(), torch.zeros(1, 3, 64, 64)
    weights = plain(basic_net(1))
    made = []

    def note(name, text):
        made.append({"name": f"unreadable/{name}", "file": f"unreadable/{name}", "npz": None, "code_base": "unreadable",
                     "note": text, "expect": "refuse", "flags": []})

    def put(name, content, text):
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        note(name, text)

    def saved(name, thing, text, **options):
        torch.save(thing, out / name, **options)
        note(name, text)

    torch.jit.save(torch.jit.trace(basic_net(1), image), out / "torchscript.pt")
    note("torchscript.pt", "torch.jit.save")
    torch.export.save(torch.export.export(basic_net(1), (image,)), out / "exported.pt2")
    note("exported.pt2", "torch.export.save")
    quantised = torch.ao.quantization.quantize_dynamic(basic_net(1), {nn.Linear})
    saved("dynamically_quantised.pth", quantised.state_dict(), "int8 Linear: head._packed_params")
    saved("whole_module.pth", network, "torch.save(model): a pickled class")
    saved("whole_module_legacy.pth", network, "the same before torch 1.6", _use_new_zipfile_serialization=False)
    saved("optimizer_only.pth", sgd(network).state_dict(), "an optimizer's state dict")
    saved("bare_tensor.pth", torch.ones(3, 4), "one tensor")
    saved("list_of_tensors.pth", [torch.ones(3, 4), torch.zeros(2)], "a list of tensors")
    saved("no_weights.pth", {"epoch": 3, "loss": 0.5}, "a dict without tensors")
    saved("empty_state_dict.pth", {"state_dict": {}}, "no tensor")
    saved("backbone_only.pth", assemble({"": Body()}).state_dict(), "no classifier")
    import timm
    if not TINY:
        saved("vision_transformer.pth", timm.create_model("test_vit", num_classes=9).state_dict(), "another family")
    torch.distributed.checkpoint.save({"model": weights}, checkpoint_id=str(out / "distributed"), no_dist=True)
    note("distributed", "a folder of torch.distributed.checkpoint")

    buffer = io.BytesIO()
    torch.save(weights, buffer)
    whole = buffer.getvalue()
    put("gzipped.pth", gzip.compress(whole, mtime=0), "gzip around a checkpoint")
    put("truncated.pth", whole[:len(whole) // 2], "the first half of a checkpoint")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("model_best.pth")
        member.size = len(whole)
        archive.addfile(member, io.BytesIO(whole))
    put("archive.pth.tar", buffer.getvalue(), "a real tar archive with a checkpoint in it")
    jpeg = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00" + bytes(64) + b"\xff\xd9"

    def zipped(members):
        into = io.BytesIO()
        with zipfile.ZipFile(into, "w") as archive:
            for name, content in members.items():
                archive.writestr(zipfile.ZipInfo(name), content)
        return into.getvalue()

    put("photos.zip", zipped({"photos/a.jpg": jpeg, "photos/b.jpg": jpeg}), "pictures")
    put("photos.pth", zipped({"photos/a.jpg": jpeg}), "pictures, misnamed")
    put("zipped_checkpoint.zip", zipped({"model_best.pth": whole}), "a zip archive with a checkpoint in it")
    hdf5 = b"\x89HDF\r\n\x1a\n" + bytes(range(256)) * 4
    put("network.h5", hdf5, "Keras, HDF5")
    put("network.keras", zipped({"metadata.json": b"{}", "config.json": b"{}", "model.weights.h5": hdf5}), "Keras 3")
    buffer = io.BytesIO()
    np.savez(buffer, **{k: v.numpy() for k, v in weights.items()})
    put("weights.npz", buffer.getvalue(), "numpy")
    put("arrays.pkl", pickle.dumps({k: v.numpy() for k, v in weights.items()}), "a plain pickle of numpy arrays")
    put("model.ckpt-1000.index", bytes(43) + bytes.fromhex("57fb808b247547db"), "TensorFlow checkpoint")
    put("model.ckpt-1000.data-00000-of-00001", bytes(256), "TensorFlow checkpoint")
    put("saved_model/saved_model.pb", b"\x08\x01\x12\x06\x0a\x04\x0a\x02v2", "TensorFlow SavedModel")
    index = {"metadata": {"total_size": 1000}, "weight_map": {"fc.weight": "model-00001-of-00002.safetensors"}}
    put("model.safetensors.index.json", json.dumps(index).encode(), "index of a sharded Hugging Face model")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 97781949\n"
    put("lfs_pointer.pth", pointer, "git-lfs left its pointer")
    put("page.pth", b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n", "a page of a web site")
    put("empty.pth", b"", "nothing")
    put("junk.pth", bytes(random.Random(1).randbytes(4096)), "noise")
    put("broken.safetensors", (1 << 40).to_bytes(8, "little") + b"{}", "a header longer than the file")
    return made


def write(out, name, made, suffix, code_base, seed):
    """Saves one entry, and returns the files' names."""
    saved, networks, side = made
    path = out / (name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(saved):
        path = saved(out / name)
    else:
        located = torch.serialization.location_tag
        if code_base in ON_CUDA:
            torch.serialization.location_tag = lambda storage: "cuda:0"
        torch.save(saved, path, _use_new_zipfile_serialization=not name.endswith("_legacy"))
        torch.serialization.location_tag = located
    x = images(side, seed)
    arrays = {"x": x.numpy()}
    for key, network in networks.items():
        if not key:
            continue
        module = network if isinstance(network, nn.Module) else networks.get("", networks["y"])
        with torch.no_grad():
            module.double()
            arrays[key] = network(x.double()).double().numpy()
            module.float()
    np.savez(out / f"{name}.npz", **arrays)
    return str(path.relative_to(out)), f"{name}.npz"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--only", type=lambda text: text.split(","), help="names; `unreadable` is one")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    arguments.out.mkdir(parents=True, exist_ok=True)
    table = []
    for name, (make, suffix, code_base, note, expect, flags) in ENTRIES.items():
        if arguments.only and name not in arguments.only:
            continue
        seed = zlib.crc32(name.encode()) % 100_000
        torch.manual_seed(seed)
        file, npz = write(arguments.out, name, make(seed), suffix, code_base, seed)
        table.append({"name": name, "file": file, "npz": npz, "code_base": code_base, "note": note, "expect": expect,
                      "flags": flags})
    if not arguments.only or "unreadable" in arguments.only:
        torch.manual_seed(0)
        table += unreadable(arguments.out / "unreadable")
    (arguments.out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    print(len(table), "entries")


if __name__ == "__main__":
    main()
