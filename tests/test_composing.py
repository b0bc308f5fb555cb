# SPDX-License-Identifier: Apache-2.0
"""Several methods on one model: their order, what they share, what one takes over from others."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import subjects
from contracts.models import MODELS
from contracts.table import IDS
from flax import nnx

import jpeft
from jpeft import seams
from jpeft._method import Method, Start, Targets

KEY = jax.random.key(0)
SHARES = []


@dataclasses.dataclass(frozen=True)
class InScale(Method):
    """x * a on the way in."""

    kind: ClassVar[str] = "in_scale"
    targets: tuple[str, ...] = ("up", "down")

    def select(self, model_type):
        return Targets(self.targets)

    def start(self, site, base, key):
        return Start({"a": jnp.ones((*site.lead, site.d_in))})

    def before(self, adapter, base, *inputs):
        return (inputs[0] * jnp.broadcast_to(adapter.a[...], inputs[0].shape),)

    def on_the_way_in(self, site):
        return True

    def merge(self, adapter, base):
        return {"kernel": base.kernel[...] * adapter.a[...][..., None]}

    def count(self, site):
        return site.d_in, site.d_in * site.d_out


@dataclasses.dataclass(frozen=True)
class InMix(InScale):
    """x R on the way in, with a full matrix, so that the order of two of them counts."""

    kind: ClassVar[str] = "in_mix"

    def start(self, site, base, key):
        return Start({"a": jnp.broadcast_to(jnp.eye(site.d_in), (*site.lead, site.d_in, site.d_in))})

    def before(self, adapter, base, *inputs):
        return (inputs[0] @ adapter.a[...],)

    def merge(self, adapter, base):
        return {"kernel": adapter.a[...] @ base.kernel[...]}


@dataclasses.dataclass(frozen=True)
class OutScale(InScale):
    """y * a on the way out."""

    kind: ClassVar[str] = "out_scale"

    def start(self, site, base, key):
        return Start({"a": jnp.ones((*site.lead, site.d_out))})

    def before(self, adapter, base, *inputs):
        return inputs

    def after(self, adapter, base, y, *inputs):
        return y * jnp.broadcast_to(adapter.a[...], y.shape)

    def on_the_way_in(self, site):
        return False

    def merge(self, adapter, base):
        a = adapter.a[...]
        return {"kernel": base.kernel[...] * a[..., None, :], "bias": base.bias[...] * a}


@dataclasses.dataclass(frozen=True)
class OneForAll(InScale):
    """y + c with one c for the whole model."""

    kind: ClassVar[str] = "one_for_all"

    def start(self, site, base, key):
        return Start({})

    def start_shared(self, site, model, key):
        assert all(member.adapter == site.adapter for member in site.members)
        return Start({"c": jnp.zeros(())}, {"places": jnp.arange(len(site.members))})

    def share(self, adapter):
        SHARES.append(adapter.site.adapter)
        return adapter.c[...]

    def before(self, adapter, base, *inputs):
        return inputs

    def after(self, adapter, base, y, *inputs):
        return y + adapter.shared

    def on_the_way_in(self, site):
        return False

    def merge(self, adapter, base):
        return {"bias": base.bias[...] + adapter.shared}

    def count(self, site):
        return (1, 0) if site.seam == "model" else (0, site.d_out)


@dataclasses.dataclass(frozen=True)
class Mean(InScale):
    """w times the mean of what two other adapters, taken over, make of y."""

    kind: ClassVar[str] = "mean"
    of: tuple[str, ...] = ("one", "two")

    def select(self, model_type):
        return Targets(self.targets, absorb=self.of)

    def start(self, site, base, key):
        return Start({"w": jnp.ones(site.lead)})

    def before(self, adapter, base, *inputs):
        return inputs

    def after(self, adapter, base, y, *inputs):
        both = [part.method.after(part, base, y, *inputs) for part in adapter.parts.values()]
        return adapter.w[...] * sum(both) / len(both)


def base(stacked=True):
    make = subjects.Stacked if stacked else subjects.ListOfLayers
    return make(4, 2, nnx.Rngs(0))


X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
ORDERS = [
    InScale() | jpeft.LoRA(rank=2, targets=["up", "down"]),
    jpeft.LoRA(rank=2, targets=["up", "down"]) | InMix(),
    OutScale() | jpeft.LoRA(rank=2, targets=["up", "down"]) | InMix(),
    jpeft.LoRA(rank=2, targets=["up"]) | OutScale() | InScale(),
    InMix() | InScale() | OutScale() | OneForAll(),
    InMix() | InMix(),
]


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
@pytest.mark.parametrize("hybrid", ORDERS, ids=lambda hybrid: " | ".join(m.kind for m in hybrid.methods))
def test_a_hybrid_merges_in_every_order(hybrid, stacked):
    model = subjects.fill(jpeft.adapt(base(stacked), hybrid, key=KEY))
    with jax.enable_x64(True):
        model = subjects.in_float64(model)
        x = X.astype(np.float64)
        assert subjects.error(jpeft.merge(model)(x), model(x)) < subjects.FLOAT64
        assert subjects.error(model(x), jpeft.strip(model)(x)) > 1e-2


def test_methods_act_in_the_order_in_which_they_were_put_on():
    """In: x R1 R2. Out: (y g + delta), not (y + delta) g."""
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    holder = nnx.Dict(up=model)
    hybrid = dataclasses.replace(InMix(), targets=("up",)) | dataclasses.replace(InMix(), targets=("up",))
    hybrid |= dataclasses.replace(OutScale(), targets=("up",)) | jpeft.LoRA(rank=2, alpha=3, targets=["up"])
    adapted = subjects.fill(jpeft.adapt(Holder(holder["up"]), hybrid, key=KEY))
    flat = subjects.as64(subjects.leaves(adapted))
    at = {path.removeprefix("up/"): value for path, value in flat.items()}
    x = X.astype(np.float64)
    inner = x @ at["adapters/in_mix/a"] @ at["adapters/in_mix_2/a"] @ at["kernel"] + at["bias"]
    delta = 1.5 * x @ at["adapters/lora/A"] @ at["adapters/lora/B"]
    assert subjects.error(adapted(X), inner * at["adapters/out_scale/a"] + delta) < subjects.FLOAT32


class Holder(nnx.Module):
    """One projection, called up."""

    def __init__(self, up):
        self.up = up

    def __call__(self, x):
        return self.up(x)


def test_a_hybrid_names_its_methods():
    lora = jpeft.LoRA(targets=["up"])
    hybrid = lora | (OutScale() | lora)
    assert hybrid == (lora | OutScale()) | lora
    assert [name for name, _ in hybrid.named(None)] == ["lora", "out_scale", "lora_2"]
    assert [name for name, _ in hybrid.named("a")] == ["a_lora", "a_out_scale", "a_lora_2"]
    model = jpeft.adapt(base(), hybrid, key=KEY, name="a")
    assert {row.name for row in jpeft.summary(model).rows} == {"a_lora", "a_out_scale", "a_lora_2"}


def test_a_hybrid_takes_methods():
    with pytest.raises(TypeError, match="made of jpeft methods, got 3"):
        jpeft.LoRA() | 3  # type: ignore[operator]


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_shared_leaves_stand_at_the_root_once(stacked):
    model = jpeft.adapt(base(stacked), OneForAll(), key=KEY)
    graphdef, trainable, frozen = jpeft.partition(model)
    assert list(trainable) == ["adapters/one_for_all/c"]
    assert frozen["adapters/one_for_all/places"].size == (2 if stacked else 4)
    SHARES.clear()
    jax.jit(lambda t, f, x: jpeft.combine(graphdef, t, f)(x))(trainable, frozen, X)
    assert SHARES == ["one_for_all"]
    assert jpeft.summary(model).trainable == 1


def test_the_gradient_of_a_shared_leaf_is_over_all_places():
    model = subjects.fill(jpeft.adapt(base(), OneForAll(), key=KEY))
    graphdef, trainable, frozen = jpeft.partition(model)
    with jax.enable_x64(True):
        trainable, frozen = ({p: v.astype(np.float64) for p, v in tree.items()} for tree in (trainable, frozen))

        def loss(c):
            return jnp.sin(jpeft.combine(graphdef, {"adapters/one_for_all/c": c}, frozen)(X.astype(np.float64))).sum()

        (c,) = trainable.values()
        slope = (loss(c + 1e-6) - loss(c - 1e-6)) / 2e-6
        assert abs(jax.grad(loss)(c) - slope) < 1e-8 * abs(slope)


def test_a_part_of_a_model_with_shared_leaves_cannot_run_alone():
    model = jpeft.adapt(base(stacked=False), OneForAll(), key=KEY)
    with pytest.raises(ValueError, match=r"blocks/0/up reads what its adapter 'one_for_all' keeps .* call the adapted"):
        model.blocks[0](X)


def test_a_name_is_taken_at_the_root_too():
    model = jpeft.adapt(base(), dataclasses.replace(OneForAll(), targets=("up",)), key=KEY)
    with pytest.raises(ValueError, match="root already has an adapter 'one_for_all'"):
        jpeft.adapt(model, dataclasses.replace(OneForAll(), targets=("down",)), key=KEY)


def fused():
    model = base()
    for name in Mean().of:
        model = subjects.fill(jpeft.adapt(model, OutScale(), key=KEY, name=name), seed=len(name) + ord(name[0]))
    return model, jpeft.adapt(model, Mean(), key=KEY)


def test_what_is_taken_over_is_frozen_and_kept():
    before, model = fused()
    _, trainable, frozen = jpeft.partition(model)
    assert sorted(trainable) == ["blocks/down/adapters/mean/w", "blocks/up/adapters/mean/w"]
    _, old, _ = jpeft.partition(before)
    for path, value in old.items():
        parts = path.split("/")
        np.testing.assert_array_equal(frozen["/".join([*parts[:3], "mean", "parts", *parts[3:]])], value)
    assert jpeft.strip(model)(X).tolist() == base()(X).tolist()


def test_what_is_taken_over_acts_through_its_new_owner():
    before, model = fused()
    flat = subjects.as64(subjects.leaves(before))
    x = X.astype(np.float64)
    for i in range(2):
        at = {path.removeprefix("blocks/"): value[i] for path, value in flat.items()}
        h = np.tanh(_mean(at, "up", x))
        x = x + _mean(at, "down", h)
    assert subjects.error(model(X), x) < subjects.FLOAT32


def _mean(at, name, x):
    y = x @ at[f"{name}/kernel"] + at[f"{name}/bias"]
    return y * (at[f"{name}/adapters/one/a"] + at[f"{name}/adapters/two/a"]) / 2


def test_only_adapters_that_are_there_can_be_taken_over():
    model = jpeft.adapt(base(), OutScale(), key=KEY, name="one")
    with pytest.raises(ValueError, match="carries the adapters one, two together; it has one"):
        jpeft.adapt(model, Mean(), key=KEY)


def test_an_adapter_that_trains_copies_cannot_be_taken_over():
    model = base()
    for name in Mean().of:
        method = jpeft.LoRA(targets=["up", "down"], bias="lora_only" if name == "one" else "none")
        model = jpeft.adapt(model, method, key=KEY, name=name)
    with pytest.raises(ValueError, match=r"'one' trains bias of blocks/down too, .* adapt without bias="):
        jpeft.adapt(model, Mean(), key=KEY)


@dataclasses.dataclass(frozen=True)
class Everywhere(Method):
    """Nothing, at one kind of seam."""

    kind: ClassVar[str] = "everywhere"
    seam: str = "residual"
    blocks: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None

    def select(self, model_type):
        return Targets(".*", layers=self.layers, seam=self.seam, blocks=self.blocks)

    def count(self, site):
        return 0, 0


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("seam", seams.KINDS)
def test_a_site_says_what_its_seam_is(model, seam):
    built = MODELS[model].build()
    method = Everywhere(seam)
    if seam == "projection":
        return
    sites = [a.site for _, m in nnx.iter_modules(jpeft.adapt(built, method, key=KEY)) for a in _adapters(m) if a.acts]
    listed = {site.path: site for site in jpeft.sites(built) if site.kind == seam}
    assert {site.path for site in sites} == {*listed}
    for site in sites:
        assert (site.seam, site.d_in, site.d_out, site.block) == (
            seam,
            8,
            listed[site.path].d_out,
            listed[site.path].block,
        )
    many = {"residual": 10, "keys_values": 6, "input": 2}  # an encoder and a decoder
    few = {"residual": 4, "keys_values": 2, "input": 1}
    assert sum(len(site.names) for site in sites) == (many if model == "t5" else few)[seam]
    sites = sorted(sites, key=lambda site: site.first)
    assert [site.first for site in sites] == [sum(len(other.names) for other in sites[:i]) for i in range(len(sites))]


def _adapters(module):
    return getattr(module, "adapters", {}).values()


def test_blocks_choose_among_seams():
    model = jpeft.adapt(MODELS["bert"].build(), Everywhere(blocks=("mlp",)), key=KEY)
    (site,) = [a.site for _, m in nnx.iter_modules(model) for a in _adapters(m) if a.acts]
    assert site.path == "layers/output/residual"
    with pytest.raises(ValueError, match=r"seams.Residual\) of a block cross_attention, .* \(only of attention, mlp\)"):
        jpeft.adapt(MODELS["bert"].build(), Everywhere(blocks=("cross_attention",)), key=KEY)


@pytest.mark.parametrize("seam", [seam for seam in seams.KINDS if seam != "projection"])
def test_a_model_without_the_seam_is_refused(seam):
    with pytest.raises(ValueError, match=r"the model has none; the models of jpeft\.models have them"):
        jpeft.adapt(base(), Everywhere(seam), key=KEY)


def test_a_method_without_a_merged_form_says_so():
    model = jpeft.adapt(MODELS["llama"].build(), Everywhere(), key=KEY)
    with pytest.raises(
        ValueError, match=r"layers/attention_residual: Everywhere computes what no weights .* merged form"
    ):
        jpeft.merge(model)
    np.testing.assert_array_equal(model(IDS), MODELS["llama"].build()(IDS))
