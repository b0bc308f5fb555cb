# SPDX-License-Identifier: Apache-2.0
"""EVA against the singular values of what the places really read, and against peft."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import peft_oracle
import pytest
import subjects
import torch
from blocks_oracle import LAYERS, D, listed, stacked
from flax import nnx

import jpeft

KEY = jax.random.key(0)
SPREAD = np.array([4, 1, 1, 0.9, 0.8, 0.5])
X = (np.random.default_rng(0).standard_normal((9, 5, D)) * SPREAD + 2).astype(np.float32)
TARGETS = ["up", "down"]


def read64(model):
    """What every projection of the blocks reads, by name, as rows in float64."""
    flat = subjects.as64(jpeft.partition(model)[2])

    def leaf(name, i, kind):
        stack = flat.get(f"blocks/{name}/{kind}")
        return flat[f"blocks/{i}/{name}/{kind}"] if stack is None else stack[i]

    x, rows = X.reshape(-1, D).astype(np.float64), {}
    for i in range(LAYERS):
        rows[f"blocks.{i}.up"] = x
        rows[f"blocks.{i}.down"] = middle = np.tanh(x @ leaf("up", i, "kernel") + leaf("up", i, "bias"))
        x = x + middle @ leaf("down", i, "kernel") + leaf("down", i, "bias")
    return rows


def expected(rows, rank, rho):
    """(directions `[rank, d_in]`, singular values) by name: of all places the largest shares of variance."""
    parts = {name: np.linalg.svd(x - x.mean(0), full_matrices=False)[1:] for name, x in rows.items()}
    shares = [(s**2 / (s**2).sum())[: round(rank * rho)] for s, _ in parts.values()]
    least = np.sort(np.concatenate(shares))[::-1][: rank * len(parts)][-1]
    ranks = [int((share >= least).sum()) for share in shares]
    return {name: (v[:r], s[:r]) for r, (name, (s, v)) in zip(ranks, parts.items(), strict=True)}


def starts(model):
    """A `[rank, d_in]`, without padding, and the factor, by name."""
    found = {}
    for _, module in nnx.iter_modules(model):
        for adapter in getattr(module, "adapters", {}).values():
            site, leaf = adapter.site, np.asarray(adapter.A[...])
            if adapter.acts:
                table, ranks = adapter.method.table(site).max(-1), adapter.method.ranks(site)
                for i, name in enumerate(site.names):
                    if ranks[i]:
                        found[name] = (leaf[i] if site.lead else leaf).T[: ranks[i]], table[i]
    return found


def assert_same_directions(found, directions, tolerance=1e-4):
    """Rows are equal but for their signs."""
    signs = np.sign((found * directions).sum(-1, keepdims=True))
    np.testing.assert_allclose(found * signs, directions, atol=tolerance)


@pytest.mark.parametrize("make", [stacked, listed])
@pytest.mark.parametrize("rho, whiten", [(1, False), (2, False), (2.5, True)])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_holds_what_varies_most(make, rho, whiten, rslora):
    base, method = make(), jpeft.LoRA(rank=2, alpha=3, targets=TARGETS, rslora=rslora)
    model = jpeft.eva(base, method, [X[:4], X[4:8], X[8:]], key=KEY, rho=rho, whiten=whiten)
    found, wanted = starts(model), expected(read64(base), 2, rho)
    assert found.keys() == {name for name, (v, _) in wanted.items() if len(v)}
    assert ({len(v) for v, _ in wanted.values()} == {2}) == (rho == 1)
    for name, (a, factor) in found.items():
        v, s = wanted[name]
        assert_same_directions(a, v / np.sqrt(s)[:, None] if whiten else v)
        assert factor == pytest.approx(3 / (2**0.5 if rslora else 2))
    np.testing.assert_array_equal(model(X), base(X))


def test_places_that_get_nothing_are_left_out():
    """In one layer what is read varies along one line, in the others along six."""
    base = listed()
    base.blocks[1].up.kernel.set_value(base.blocks[1].up.kernel[...] * 1e-3)
    rows = np.random.default_rng(1).standard_normal((40, D)).astype(np.float32)
    method = jpeft.LoRA(rank=1, targets=TARGETS, exclude=["blocks.0.down"])
    model = jpeft.eva(base, method, [rows], key=KEY, rho=6)
    ranks = {name: len(a) for name, (a, _) in starts(model).items()}
    assert sum(ranks.values()) == 5
    assert 1 <= len(ranks) < 5
    assert "blocks.0.down" not in ranks


def test_dora_a_name_and_a_run_of_ones_own():
    base = stacked()
    batches = [{"rows": X}]
    given = {"key": KEY, "name": "mine", "run": lambda model, batch: {"out": model(batch["rows"])}}
    model = jpeft.eva(base, jpeft.DoRA(rank=2, targets=".*up", exclude=r".*0\.up"), batches, rho=1, **given)
    wanted = expected(read64(base), 2, 1)
    found = starts(model)
    assert sorted(found) == ["blocks.1.up", "blocks.2.up"]
    for name, (a, _) in found.items():
        assert_same_directions(a, wanted[name][0])
    assert all("/adapters/mine/" in path for path in jpeft.partition(model)[1])
    assert subjects.error(model(X), base(X)) < subjects.FLOAT32


def test_padding_does_not_count():
    base = peft_oracle.jax_model("bert tokens")
    method = jpeft.LoRA(rank=3, targets=["query", "value"], modules_to_save=())
    ids = np.asarray(peft_oracle.IDS)
    mask = np.ones_like(ids)
    mask[:, -2:] = 0
    cut = starts(jpeft.eva(base, method, [{"input_ids": ids[:, :-2]}], key=KEY))
    padded = starts(jpeft.eva(base, method, [{"input_ids": ids, "attention_mask": mask}], key=KEY))
    assert cut.keys() == padded.keys()
    for name, (a, _) in cut.items():
        assert_same_directions(padded[name][0], a, 1e-3)


@pytest.mark.parametrize("family", ["bert tokens", "llama"])
def test_it_is_pefts(family):
    base = peft_oracle.jax_model(family)
    targets = {"bert tokens": ["query", "value", "dense"], "llama": ["q_proj", "v_proj", "down_proj"]}[family]
    ids = np.random.default_rng(2).integers(3, 20, (8, 9))
    mask = np.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": mask}
    model = jpeft.eva(base, jpeft.LoRA(rank=2, alpha=4, targets=targets, modules_to_save=()), [batch], key=KEY)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=targets, init_lora_weights="eva", eva_config=peft.EvaConfig()
    )
    torch_batch = {name: torch.tensor(value) for name, value in batch.items()}
    with peft_oracle.quiet():
        other = peft.get_peft_model(peft_oracle.torch_model(family), config, low_cpu_mem_usage=True).eval()
        peft.initialize_lora_eva_weights(other, [torch_batch] * 3, show_progress_bar=False)
    found = starts(model)
    theirs = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): value.detach().numpy()
        for name, value in other.named_parameters()
        if "lora_A" in name
    }
    assert found.keys() == theirs.keys()
    for name, a in theirs.items():
        assert a.shape == found[name][0].shape, name
        assert_same_directions(found[name][0], a, 1e-2)


class Convolved(nnx.Module):
    """A projection that reads no rows."""

    def __init__(self):
        self.inner = nnx.Conv(2, 3, (3,), rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"method": jpeft.IA3(targets=TARGETS, feedforward=[])}, TypeError, "got IA3"),
        ({"method": jpeft.LoRA(targets=TARGETS, init="pissa")}, ValueError, "init must be 'default', got 'pissa'"),
        ({"rho": 0.5}, ValueError, "at least 1; got 0.5"),
        ({"batches": []}, ValueError, "no batch"),
        ({"batches": {"x": X}}, TypeError, r"several batches, \[batch, ...\]; got one dict"),
        ({"batches": [X[:1, :2]]}, ValueError, "in 2 rows varies in 1 directions, fewer than the rank 2"),
        ({"batches": [np.full_like(X, np.nan)]}, ValueError, r"what blocks\.0\.\w+ reads is not finite"),
    ],
)
def test_what_cannot_be_started_is_refused(change, error, message):
    given = {"method": jpeft.LoRA(rank=2, targets=TARGETS), "batches": [X], "rho": 2.0} | change
    with pytest.raises(error, match=message):
        jpeft.eva(stacked(), given.pop("method"), given.pop("batches"), key=KEY, **given)


def test_a_projection_without_rows_is_refused():
    with pytest.raises(ValueError, match="Conv is not a row"):
        jpeft.eva(Convolved(), jpeft.LoRA(rank=1, targets=["inner"]), [jnp.ones((2, 5, 2))], key=KEY)


def test_an_embedding_is_refused():
    base = peft_oracle.jax_model("bert tokens")
    with pytest.raises(ValueError, match="is an embedding, which reads ids"):
        jpeft.eva(base, jpeft.LoRA(targets=["word_embeddings"]), [peft_oracle.IDS], key=KEY)
