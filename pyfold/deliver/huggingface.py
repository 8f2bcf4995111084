"""A Hugging Face folder: patched config.json, modeling file of a per-layer result, index, model card, pyfold.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyfold import __version__
from pyfold.errors import PyfoldError
from pyfold.families import FAMILIES, Family
from pyfold.families.attention import KV_HEADS, QUERY_HEADS
from pyfold.io.checkpoint import Checkpoint
from pyfold.plan import Plan
from pyfold.report import GroupReport, how_to_load

MODELING = "modeling_pyfold.py"
_READS_GLOBAL = "allow_global_per_layer_attribute_access"
_MODELING_TEMPLATE = '''"""{prefix} with widths and heads per layer: `per_layer_config` in config.json. Written by pyfold."""

from transformers import {prefix}ForCausalLM, {prefix}Model
from transformers.models.{model_type}.modeling_{model_type} import {prefix}Attention, {prefix}MLP


class PerLayerWidths:
    def __init__(self, config):
        layer_configs, overrides = list(config.per_layer_config), config.to_dict()["per_layer_config"]
        config.per_layer_config = None  # the base class reads one width
        super().__init__(config)
        config.per_layer_config = overrides
        for i, (layer, layer_config) in enumerate(zip(self.base_model.layers, layer_configs)):
            layer.mlp = {prefix}MLP(layer_config)
            layer.self_attn = {prefix}Attention(layer_config, i)
            layer.self_attn.config = config  # how attention is computed is the model's to say
        self.post_init()


class Folded{prefix}Model(PerLayerWidths, {prefix}Model):
    pass


class Folded{prefix}ForCausalLM(PerLayerWidths, {prefix}ForCausalLM):
    pass
'''


# metric and repair -> the merge rule, for machines and for people
_MERGES = {
    "weight": (
        "mean rows, summed columns",
        "Feed-forward units are clustered on their weights (Ward, then Hartigan's refinement); each cluster's gate and up rows "
        "are averaged and its down columns summed.",
    ),
    "variance": (
        "mean rows, summed columns, scaled to the output's variance",
        "Feed-forward units are clustered on their weights (Ward, then Hartigan's refinement); each cluster's gate and up rows "
        "are averaged and its down columns summed, all of these scaled so that the output keeps its variance on noise.",
    ),
    "function": (
        "strongest member's rows, columns regressed on it",
        "Feed-forward units are clustered on what they contribute on the calibration tokens (Ward, then Hartigan's "
        "refinement); each cluster's strongest member stands for it, and the others' down columns are regressed on it.",
    ),
    "ridge": (
        "strongest member's rows, columns by ridge regression",
        "Feed-forward units are clustered on what they contribute on the calibration tokens (Ward, then Hartigan's "
        "refinement); each cluster's strongest member stands for it, and the down columns are fitted by ridge regression.",
    ),
}
_HEADS = (
    "Of attention, whole KV heads go with their query heads: those whose output the others make up for best. Each one's "
    "columns of o_proj are added to those of the head that attends most like it, once aligned; o_proj is then fitted by ridge "
    "regression."
)


def _merge(options: dict[str, Any]) -> tuple[str, str]:
    """The merge rule that options ask for."""
    if options.get("metric") != "function":
        return _MERGES[options.get("repair", "weight")]
    rule, text = _MERGES["ridge" if options["repair"] == "ridge" else "function"]
    return rule, text.replace("the calibration tokens", "Gaussian noise") if options["calibration"] == "none" else text


def modeling_file(family: Family) -> str:
    """The modeling file of a per-layer result."""
    return _MODELING_TEMPLATE.format(prefix=family.class_prefix, model_type=family.model_type)


def modules(config: dict[str, Any]) -> set[str]:
    """The files of custom code beside a config that it names."""
    targets = config.get("auto_map", {}).values()
    names = {name for target in targets for name in (target if isinstance(target, list) else [target]) if name}
    return {name.partition(".")[0] + ".py" for name in names if "--" not in name}


def has_own_modeling_file(folder: Path, families: dict[str, Family]) -> bool:
    """Whether the custom code that a folder's config names is all pyfold's: the same auto_map, the same file, byte for byte."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = (folder / MODELING).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return any(config.get("auto_map") == _auto_map(family) and text == modeling_file(family) for family in families.values())


def _auto_map(family: Family) -> dict[str, str]:
    module, own = MODELING.removesuffix(".py"), f"Folded{family.class_prefix}"
    return {"AutoModel": f"{module}.{own}Model", "AutoModelForCausalLM": f"{module}.{own}ForCausalLM"}


def patched_config(checkpoint: Checkpoint, family: Family, plan: Plan, dtype: str) -> dict[str, Any]:
    """The source's config with the new widths, and nothing else changed."""
    config = dict(checkpoint.config)
    overrides = {int(layer): dict(values) for layer, values in (config.pop("per_layer_config", None) or {}).items()}
    if plan.heads:
        attention = plan.heads[0][0]
        config |= {KV_HEADS: config.get(KV_HEADS) or config[QUERY_HEADS], "head_dim": attention.head_dim}
    for key, of_layers in _settings(plan).items():
        if len(set(of_layers.values())) == 1:
            config[key] = of_layers[0]
        for layer, value in of_layers.items():
            overrides.setdefault(layer, {})[key] = value
    overrides = {layer: {k: v for k, v in values.items() if v != config.get(k)} for layer, values in sorted(overrides.items())}
    overrides = {layer: values for layer, values in overrides.items() if values}
    own = f"Folded{family.class_prefix}"
    config.pop(_READS_GLOBAL, None)
    if family.any_heads and any(QUERY_HEADS in values for values in overrides.values()):
        config[_READS_GLOBAL] = True  # what it checks is the number of no layer in particular
    if overrides:
        named = [name for name in config.get("architectures") or [] if not str(name).endswith("ForCausalLM")]
        if named:
            raise PyfoldError(
                f"{checkpoint.path / 'config.json'}: layers that differ need a ...ForCausalLM checkpoint, not {named[0]}; "
                "fold all layers alike"
            )
        config["per_layer_config"] = {str(layer): values for layer, values in overrides.items()}
        config["architectures"] = [f"{own}ForCausalLM"]
        config["auto_map"] = {**config.get("auto_map", {}), **_auto_map(family)}
    else:
        config = _stock(config, family, checkpoint.path, config[QUERY_HEADS] if plan.heads else None)
    if dtype != "keep":
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    return config


def stock_config(checkpoint: Checkpoint, family: Family, settings: dict[str, int]) -> dict[str, Any]:
    """The source's config with ``settings`` for all layers, and no code of pyfold's."""
    config = dict(checkpoint.config) | settings
    config.pop("per_layer_config", None)
    config.pop(_READS_GLOBAL, None)
    return _stock(config, family, checkpoint.path, settings.get(QUERY_HEADS))


def _stock(config: dict[str, Any], family: Family, path: Path, heads: int | None) -> dict[str, Any]:
    """Without the classes of a per-layer source; of another model type, which computes the same, where ``heads``, a number that
    is new, need it."""
    prefix = family.class_prefix
    if config.get("architectures") == [f"Folded{prefix}ForCausalLM"]:
        config["architectures"] = [f"{prefix}ForCausalLM"]
        config["auto_map"] = {key: value for key, value in config.get("auto_map", {}).items() if key not in _auto_map(family)}
        if not config["auto_map"]:
            del config["auto_map"]
    if family.any_heads and heads and config["hidden_size"] % heads:
        other = FAMILIES[family.any_heads]
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise PyfoldError(
                f"{path / 'config.json'}: {heads} query heads do not divide a hidden_size of {config['hidden_size']}, which "
                f"{prefix}Config asks for, and {other.class_prefix} has no biases; fold some of the layers' heads, or others"
            )
        config |= {"model_type": other.model_type, "sliding_window": None}
        names = config.get("architectures") or [f"{prefix}ForCausalLM"]
        config["architectures"] = [name.replace(prefix, other.class_prefix, 1) for name in names]
    return config


def _settings(plan: Plan) -> dict[str, dict[int, int]]:
    """What the plan says of every layer, by key of config.json."""
    found = {plan.groups[0][0].width_key: plan.widths}
    for layer, n_groups in plan.kv_heads.items() if plan.heads else ():
        for key, value in plan.heads[0][0].config(n_groups).items():
            found.setdefault(key, {})[layer] = value
    return found


def index(plan: Plan) -> dict[str, Any]:
    """model.safetensors.index.json."""
    return {
        "metadata": {"total_parameters": plan.n_parameters, "total_size": plan.nbytes},
        "weight_map": {name: shard for shard, names in plan.shards.items() for name in names},
    }


def identity(
    checkpoint: Checkpoint,
    plan: Plan,
    options: dict[str, Any],
    backend: str,
    groups: list[GroupReport],
    source: dict[str, str],
    result: dict[str, str],
) -> dict[str, Any]:
    """pyfold.json: everything needed to make the same bytes again, and nothing that depends on time, machine or path."""
    return {
        "pyfold_version": __version__,
        "method": {"metric": options.get("metric", "weight"), "clustering": "ward+hartigan", "merge": _merge(options)[0]},
        "backend": backend,
        "profile": "stock" if plan.uniform else "per-layer",
        "options": options,
        "groups": [vars(group) for group in groups],
        "parameters": {"before": checkpoint.n_parameters, "after": plan.n_parameters},
        "source_sha256": {name: source[name] for name in checkpoint.tensors},
        "sha256": {name: result[name] for name in plan.tensors},
    }


def model_card(
    checkpoint: Checkpoint, family: Family, plan: Plan, options: dict[str, Any], groups: list[GroupReport], license: Any
) -> str:
    """README.md with front matter, recipe and a table of the layers."""
    profile = "stock" if plan.uniform else "per-layer"
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pyfold", "model-folding"],
    }
    if checkpoint.hub_id:
        front["base_model"] = checkpoint.hub_id
    if license:
        front["license"] = license
    # JSON values are YAML values, so no YAML writer is needed.
    lines = ["---", *(f"{key}: {json.dumps(value, default=str)}" for key, value in front.items()), "---", ""]
    removed = 1 - plan.n_parameters / checkpoint.n_parameters
    data = "No data, no" if options.get("calibration", "self") in ("self", "none") else "No"
    lines += [
        f"# Folded {checkpoint.hub_id or family.class_prefix + ' model'}",
        "",
        f"{removed:.2%} of the parameters removed by model folding with pyfold "
        f"{__version__}: {checkpoint.n_parameters:,} -> {plan.n_parameters:,}. {data} fine-tuning.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = {how_to_load('PATH', profile)}",
        "```",
        "",
        "## Recipe",
        "",
        "```json",
        json.dumps(options, indent=2),
        "```",
        "",
        _merge(options)[1] + (f" {_HEADS}" if plan.heads else ""),
        "",
        "| group | width | folded | inertia, share of total |",
        "|---|---|---|---|",
        *(
            f"| {group.name} | {group.width} | {group.folded_width} | {group.inertia / (group.total_inertia or 1):.4f} |"
            for group in groups
        ),
        "",
    ]
    return "\n".join(lines)


def source_license(checkpoint: Checkpoint) -> Any:
    """The licence in the front matter of the source's model card, if it has one."""
    card = checkpoint.path / "README.md"
    if not card.is_file():
        return None
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        license = (metadata_load(card) or {}).get("license")
    except (YAMLError, ValueError, AttributeError, RecursionError) as error:
        raise PyfoldError(
            f"{card}: its front matter is not valid YAML ({str(error).splitlines()[0]}); mend or remove it"
        ) from None
    # Anything else is no licence, and aliases of aliases would fill the disk once written out.
    texts = license if isinstance(license, list) else [license]
    return license if all(isinstance(text, str) for text in texts) else None
