"""Gives a module, or what computes its attention, another class, and undoes that. A module keeps its parameters, its name and its place.

So the keys of a state_dict and peft's config stay. A module may have several patches; the newest is undone first.
"""

from functools import cache


def patch(module: object, kind: type, **attributes) -> None:
    """Changes a module's class to `kind` if that is a subclass of it, otherwise mixes `kind` into it. Sets `kind`'s attributes."""
    before = type(module)
    module.__class__ = kind if issubclass(kind, before) else _mixed(kind, before)
    module.__dict__.setdefault("_patches", []).append((before, kind, tuple(attributes)))
    for name, value in attributes.items():
        setattr(module, name, value)


def unpatch(module: object, kind: type) -> bool:
    """Undoes `patch(module, kind)` and returns whether there was such a patch. Raises ValueError if the module has a newer patch."""
    patches = module.__dict__.get("_patches", [])
    if kind not in [patched for _, patched, _ in patches]:
        return False
    before, newest, names = patches[-1]
    if newest is not kind:
        raise ValueError(f"{type(module).__name__}: {newest.__name__} came after {kind.__name__}; undo it first")
    module.__class__ = before
    for name in names:
        delattr(module, name)
    patches.pop()
    if not patches:
        del module._patches
    return True


@cache
def _mixed(kind: type, base: type) -> type:
    return type(base.__name__, (kind, base), {"__module__": base.__module__})
