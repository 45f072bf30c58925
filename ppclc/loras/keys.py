"""How LoRA files name what they change: the schemes of diffusers and PEFT, ComfyUI and kohya, in diffusers' names or in the model's first ones.

A name is looked up among those that the family's own modules have, never taken apart: kohya's underscores stand for dots as well as for themselves.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ppclc.errors import ModelError
from ppclc.families import Family

Role = Literal["down", "up", "alpha", "bias"]


class Scheme(NamedTuple):
    """What stands in front of a module's name, and whether its dots are underscores."""

    name: str
    prefix: str
    flat: bool = False


SCHEMES = (
    Scheme("diffusers", "base_model.model.transformer."),
    Scheme("diffusers", "base_model.model."),
    Scheme("diffusers", "transformer."),
    Scheme("comfyui", "diffusion_model."),
    Scheme("kohya", "lora_unet_", flat=True),
    Scheme("kohya", "lora_transformer_", flat=True),
    Scheme("diffusers", ""),
)
TEXT_ENCODERS = re.compile(r"text_encoders?(_\d)?\.|lora_te\d?_")
"""Beginnings of keys that are of another model of the pipeline."""


class Style(NamedTuple):
    """How the two factors are called. has_bias: whether diffusers reads a bias beside the second one."""

    down: str
    up: str
    has_bias: bool

    def suffix(self, role: Role) -> str:
        """What stands behind a module's name in a key."""
        return {"down": self.down, "up": self.up, "alpha": "alpha", "bias": self.up.removesuffix("weight") + "bias"}[role]


STYLES = (
    Style("lora_A.weight", "lora_B.weight", True),
    Style("lora_A.default.weight", "lora_B.default.weight", True),
    Style("lora_down.weight", "lora_up.weight", False),
    Style("lora.down.weight", "lora.up.weight", True),
)
COMFYUI_BIAS = "diff_b"
"""ComfyUI's change of a bias, which it multiplies by no alpha. Source: `load_lora` in its comfy/lora.py."""
UNSUPPORTED = {
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "oft_": "OFT",
    "boft_": "BOFT",
    "lora_mid": "LoCon of convolutions",
    "diff": "a full difference of weights",
    "set_weight": "a full weight",
    "w_norm": "a difference of a norm",
    "b_norm": "a difference of a norm",
    "reshape_weight": "a weight of another shape",
}
"""Kinds of adapters that are not two factors, by how a part of their keys begins."""


class Name(NamedTuple):
    """A linear map as a file may name it: a block's (`path`, `number`), or one outside of blocks (`path` is empty).

    modules: the maps in diffusers' model whose rows it holds, in order.
    """

    path: str
    number: int
    part: str
    modules: tuple[str, ...]

    def dotted(self, number: int) -> str:
        """The name with that number of a block."""
        return f"{self.path}.{number}.{self.part}" if self.path else self.part


@dataclass(frozen=True)
class Adapter:
    """Two factors of a file: what they change, how that is spelled, and the keys of their tensors."""

    name: Name
    scheme: Scheme
    style: Style
    keys: Mapping[Role, str]

    def key(self, role: Role, number: int) -> str:
        """The key of one of its tensors where the block has that number, spelled as the file spells it."""
        return self._key(self.style.suffix(role), number)

    def bias_key(self, number: int) -> str:
        """The key of a change of the bias: diffusers' where it reads one in this scheme, else ComfyUI's."""
        return self.key("bias", number) if self.peft_bias else self._key(COMFYUI_BIAS, number)

    @property
    def peft_bias(self) -> bool:
        """Whether a bias is the second factor's, which is multiplied by the same scale, and of which all adapters of a file have one."""
        return self.scheme.name == "diffusers" and self.style.has_bias

    def _key(self, suffix: str, number: int) -> str:
        dotted = self.name.dotted(number)
        return f"{self.scheme.prefix}{dotted.replace('.', '_') if self.scheme.flat else dotted}.{suffix}"


def names_of(family: Family, config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Name]:
    """Every name that a file may have for these modules of a family's model, dotted, in diffusers' words and in the model's first ones."""
    found = {}
    for module in modules:
        group = next((g for g in family.groups if module.startswith(f"{g.path}.")), None)
        block, _, part = module.removeprefix(f"{group.path}.").partition(".") if group else ("0", "", module)
        found[module] = Name(group.path if group else "", int(block), part, (module,))
    first = {}
    for group, size in zip(family.groups, family.sizes(config), strict=True):
        for part, own in group.original.items():
            for number in range(size):
                name = Name(group.original_path, number, part, tuple(f"{group.path}.{number}.{p}" for p in own))
                first[name.dotted(number)] = name
    first |= {name: Name("", 0, name, (module,)) for name, module in family.original.items()}
    return {k: n for k, n in first.items() if all(m in found for m in n.modules)} | found


def adapters_in(keys: Iterable[str], names: Mapping[str, Name], family: Family, config: Mapping[str, Any]) -> list[Adapter]:
    """The adapters of a file by its keys, those of text encoders left out.

    Raises:
        ModelError: keys of another kind of adapter or of another model; one factor without the other; one module twice.
    """
    stems: dict[str, dict[Role, tuple[str, Style | None]]] = {}
    for key in sorted(keys):
        if TEXT_ENCODERS.match(key):
            continue
        stem, role, style = _split(key)
        roles = stems.setdefault(stem, {})
        if role in roles:
            raise ModelError(f"{roles[role][0]} and {key}: two spellings of one module, wanted one of them")
        roles[role] = key, style
    flat = _flat(names)
    placed = {stem: place for stem in stems if (place := _place(stem, names, flat)) is not None}
    _check_places(stems, placed, family, config)
    adapters = [_adapter(stem, roles, *placed[stem]) for stem, roles in stems.items()]
    seen: dict[str, str] = {}
    for adapter in adapters:
        for module in adapter.name.modules:
            if module in seen:
                raise ModelError(f"{seen[module]} and {adapter.keys['down']}: two spellings of {module}, wanted one of them")
            seen[module] = adapter.keys["down"]
    return adapters


def _split(key: str) -> tuple[str, Role, Style | None]:
    """A key's module as it is spelled, and what of it the tensor is. Raises ModelError for other kinds of adapters."""
    for style in STYLES:
        roles: tuple[Role, ...] = ("down", "up", "bias") if style.has_bias else ("down", "up")
        for role in roles:
            if key.endswith(f".{style.suffix(role)}"):
                return key.removesuffix(f".{style.suffix(role)}"), role, style
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha", None
    for part in key.split("."):
        for mark, kind in UNSUPPORTED.items():
            if part == mark or part.startswith(mark if mark.endswith("_") else f"{mark}_"):
                raise ModelError(f"{key}: is {kind}, which is not supported; wanted a LoRA of two factors, such as lora_A and lora_B")
    raise ModelError(f"{key}: not a key of a LoRA; wanted lora_A and lora_B, lora_down and lora_up, or lora.down and lora.up, and alpha")


def _flat(names: Mapping[str, Name]) -> dict[str, Name]:
    """Names with underscores for dots; what would be two modules' is nobody's."""
    count = Counter(name.replace(".", "_") for name in names)
    return {flat: n for name, n in names.items() if count[flat := name.replace(".", "_")] == 1}


def _place(stem: str, names: Mapping[str, Name], flat: Mapping[str, Name]) -> tuple[Scheme, Name] | None:
    for scheme, rest in _rests(stem):
        if (name := (flat if scheme.flat else names).get(rest)) is not None:
            return scheme, name
    return None


def _rests(stem: str) -> Iterator[tuple[Scheme, str]]:
    """What a module's name would be in each scheme that its spelling may be of."""
    yield from ((s, stem.removeprefix(s.prefix)) for s in SCHEMES if stem.startswith(s.prefix))


def _check_places(stems: Iterable[str], placed: Mapping[str, Any], family: Family, config: Mapping[str, Any]) -> None:
    """Raise ModelError for the first module that the family's model has not."""
    lacking = [stem for stem in stems if stem not in placed]
    for stem in lacking:
        for group, size in zip(family.groups, family.sizes(config), strict=True):
            for path in filter(None, (group.path, group.original_path)):
                for _, rest in _rests(stem):
                    number = re.match(rf"{path}[._](\d{{1,9}})[._]", rest)
                    if number and int(number[1]) >= size:
                        raise ModelError(
                            f"{stem}: block {number[1]} of {path}, but the plan's teacher has {size}; is it another model's LoRA?"
                        )
    if lacking and not placed:
        raise ModelError(
            f"is no LoRA of {family.name}: none of its {len(lacking)} modules is one of {family.class_name}, {lacking[0]} first"
        )
    if lacking:
        raise ModelError(f"{lacking[0]}: no such module in {family.class_name}; does the teacher's configuration fit (--model)?")


def _adapter(stem: str, roles: Mapping[Role, tuple[str, Style | None]], scheme: Scheme, name: Name) -> Adapter:
    styles = [style for _, style in roles.values() if style is not None]
    if "down" not in roles or "up" not in roles:
        style = styles[0] if styles else STYLES[0]
        there = ", ".join(key for key, _ in roles.values())
        lacking: Role = "up" if "down" in roles else "down"
        raise ModelError(f"{stem}: has {there} and no {style.suffix(lacking)}; wanted both factors")
    if len(set(styles)) > 1:
        raise ModelError(f"{roles['down'][0]} and {roles['up'][0]}: factors of two spellings, wanted one")
    return Adapter(name, scheme, styles[0], {role: key for role, (key, _) in roles.items()})
