"""Random tiny models, and conversions by a family that is not installed."""

import json
from importlib import metadata

import torch

import phireg
from phireg.config.hf import HFConfig
from phireg.planning.build import build_plan
from phireg.planning.model import Options
from phireg.registry import Candidate, FamilyChoice
from phireg.source.readings import open_source


def randomize(model, seed=0):
    """Random weights, biases and norms; queries, keys and routers large enough to choose."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_((1 if name.endswith("weight") else 0) + 0.3 * noise)
            else:
                large = any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "router"))
                parameter.copy_(noise * parameter.shape[-1] ** -0.5 * (2.5 if large else 1))
    return model.eval()


def planned(family, directory, **options):
    hf = HFConfig(json.loads((directory / "config.json").read_text()))
    entry = metadata.EntryPoint(family.name, "under:test", "phireg.families")
    candidate = Candidate(family.name, "under test", "0", entry.value, entry)
    return build_plan(
        FamilyChoice(family, candidate), hf, open_source(directory), Options(**options)
    )


def convert(family, directory, output, **options):
    """Convert; without a dtype, float32."""
    plan = planned(family, directory, **{"dtype": "float32", **options})
    assert plan.errors == ()
    phireg.convert(plan, output)
    return output


def errors(family, directory, **options):
    return [(e.code, e.subject, e.detail) for e in planned(family, directory, **options).errors]
