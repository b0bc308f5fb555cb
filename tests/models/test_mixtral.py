# SPDX-License-Identifier: Apache-2.0
"""Mixtral's own: how experts are computed, checkpoints of both layouts, sharding, quantizing, adapters on experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama_reference import QUICK, assert_close, flat
from zoo_reference import batch, build, outputs_of, torch_model
from zoo_subjects import MIXTRAL

import jpeft
from jpeft import _grouped, models, seams
from jpeft.models import _experts, mixtral

CONFIG = {**MIXTRAL.config, "num_hidden_layers": 2}
LORA = jpeft.LoRA(rank=3, alpha=5, targets=["gate", "w1", "w2", "w3"], rank_pattern={r"experts\.1\.w2": 1})


def adapted(model, seed=0):
    """`model` with a LoRA on its experts, of which no leaf is at its start."""
    graphdef, trainable, frozen = jpeft.partition(jpeft.adapt(model, LORA, key=jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    noisy = {p: leaf + 0.2 * rng.standard_normal(leaf.shape).astype(np.float32) for p, leaf in trainable.items()}
    return graphdef, noisy, frozen


def loss_of(graphdef, trainable, frozen, inputs):
    """(logits, gradients of a loss that is linear in them)."""

    def loss(trainable, inputs):
        logits = jpeft.combine(graphdef, trainable, frozen)(**inputs)
        weights = jnp.cos(jnp.arange(logits.size).reshape(logits.shape)) * inputs["attention_mask"][..., None]
        return jnp.sum(logits * weights), logits

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    (_, logits), gradients = run(trainable, inputs)
    return logits, gradients


def test_published_count():
    assert models.num_parameters(mixtral.PRESETS["mixtral-8x7b"], "CAUSAL_LM") == 46_702_792_704


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_sorting_by_expert_changes_no_number(kind, monkeypatch):
    """Tokens are sorted by expert; logits and gradients of adapters are those of every expert with every token."""
    inputs, parts = batch(MIXTRAL), adapted(build(CONFIG, "CAUSAL_LM", remat="full"))
    monkeypatch.setattr(_grouped, "platform", lambda: kind)
    found = loss_of(*parts, inputs)
    traced = str(jax.make_jaxpr(lambda: build(CONFIG, "CAUSAL_LM")(**inputs))())
    assert ("ragged_dot_general" in traced) == (kind == "gpu")
    monkeypatch.setattr(_experts, "sorts", lambda _: False)
    outputs, gradients = loss_of(*parts, inputs)
    assert_close(found[0], outputs)
    for path, gradient in gradients.items():
        assert_close(found[1][path], gradient, path)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("many", [(0, None, None), (None, 0, None), (0, None, 0), (0, 0, 0)], ids=str)
def test_ragged_products_under_vmap(many, kind, monkeypatch):
    """Whatever is there once for each, product and gradients are those of one after another."""
    monkeypatch.setattr(_grouped, "platform", lambda: kind)
    rng = np.random.default_rng(0)
    sizes = {None: (), 0: (2,)}
    x, matrices = (
        rng.standard_normal((*sizes[m], *shape)).astype(np.float32)
        for m, shape in zip(many, ((7, 3), (4, 3, 5)), strict=False)
    )
    groups = np.array([[1, 0, 4, 2], [0, 3, 3, 1]])[0 if many[2] is None else slice(None)]

    def run(*values):
        y, back = jax.vjp(lambda x, m: _grouped.ragged_dot(x, m, values[2]), *values[:2])
        return y, back(jnp.cos(y))

    found = jax.vmap(run, many)(x, matrices, groups)
    for i in range(2):
        own = [v if m is None else v[i] for v, m in zip((x, matrices, groups), many, strict=True)]
        expert = [e for e, rows in enumerate(own[2]) for _ in range(rows)]
        np.testing.assert_allclose(found[0][i], np.einsum("ni,nio->no", own[0], own[1][expert]), rtol=1e-5, atol=1e-5)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5), found, run(*own))


@pytest.mark.parametrize(
    "groups", [(0, 300, 1, 0, 399), (700, 0, 0, 0, 0), (140,) * 5, (3, 0, 0, 0, 0), (0, 1, 0, 1, 1)]
)
def test_products_by_blocks_are_the_formula(groups):
    """Experts of many blocks, of one and of none; product and gradients in float64."""
    rng, n = np.random.default_rng(0), sum(groups)
    x, matrices, weights = (rng.standard_normal(shape) for shape in ((n, 6), (5, 6, 7), (n, 7)))
    expert = np.repeat(np.arange(5), groups)
    with jax.enable_x64(True):
        given = jnp.asarray(x), jnp.asarray(matrices), jnp.asarray(groups)
        y, back = jax.vjp(lambda x, m: _grouped.ragged_dot(x, m, given[2]), *given[:2])
        assert "ragged_dot_general" not in str(jax.make_jaxpr(_grouped.ragged_dot)(*given))
        of_x, of_matrices = back(jnp.asarray(weights))
    np.testing.assert_allclose(y, np.einsum("ni,nio->no", x, matrices[expert]), atol=1e-12)
    np.testing.assert_allclose(of_x, np.einsum("no,nio->ni", weights, matrices[expert]), atol=1e-12)
    expected = np.stack([x[expert == e].T @ weights[expert == e] for e in range(5)])
    np.testing.assert_allclose(of_matrices, expected, atol=1e-11)


def test_a_checkpoint_of_joined_experts_loads(tmp_path):
    """transformers 5 can write the tensors that it holds, those of all experts in one."""
    theirs = torch_model(CONFIG, "CAUSAL_LM", MIXTRAL.classes)
    theirs.save_pretrained(tmp_path / "apart")
    theirs.save_pretrained(tmp_path / "joined", save_original_format=False)
    apart, joined = (models.load(tmp_path / name) for name in ("apart", "joined"))
    assert "gate_up_proj" in str((tmp_path / "joined" / "model.safetensors").read_bytes()[:4000])
    jax.tree.map(np.testing.assert_array_equal, flat(joined), flat(apart))


def test_joined_experts_of_another_number_do_not_fit(tmp_path):
    theirs = torch_model({**CONFIG, "num_local_experts": 4}, "CAUSAL_LM", MIXTRAL.classes)
    theirs.save_pretrained(tmp_path, save_original_format=False)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_local_experts": 4', '"num_local_experts": 5'))
    with pytest.raises(models.CheckpointError, match=r"missing keys: .*experts.4.w1.weight"):
        models.load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["tensor=2", "data=2,fsdp=2,tensor=2"])
def test_numbers_do_not_depend_on_where_experts_are(axes):
    """Logits and gradients on a mesh are those of one device."""
    config = {**CONFIG, "num_local_experts": 4, "vocab_size": 56}
    inputs = {name: np.concatenate([value] * 2)[:4] for name, value in batch(MIXTRAL).items()}
    graphdef, trainable, frozen = adapted(build(config, "CAUSAL_LM"))
    expected = loss_of(graphdef, trainable, frozen, inputs)
    mesh = jpeft.mesh(axes, devices=jax.devices()[: 2 if axes == "tensor=2" else 8])
    placed = jpeft.shard({**trainable, **frozen}, mesh)
    found = loss_of(
        graphdef, {p: placed[p] for p in trainable}, {p: placed[p] for p in frozen}, jpeft.shard_batch(inputs, mesh)
    )
    assert_close(found[0], expected[0])
    for path, gradient in expected[1].items():
        assert_close(found[1][path], gradient, path)


def test_each_device_has_its_own_experts():
    """The axis of experts is split over `tensor`, of kernels and of what adapters have beside them."""
    _, trainable, frozen = adapted(build({**CONFIG, "num_local_experts": 4}, "CAUSAL_LM"))
    placed = jpeft.shard({**trainable, **frozen}, jpeft.mesh("data=2,fsdp=2,tensor=2"), uneven="whole")
    for w, (d_in, d_out) in {"w1": (24, 20), "w2": (20, 24), "w3": (24, 20)}.items():
        at = f"layers/block_sparse_moe/experts/{w}"
        kernel, a, b = (placed[f"{at}/{leaf}"] for leaf in ("kernel", "adapters/lora/A", "adapters/lora/B"))
        split = (d_in // 2, d_out) if w != "w2" else (d_in, d_out // 2)
        assert kernel.addressable_shards[0].data.shape == (2, 2, *split)
        assert a.addressable_shards[0].data.shape == (2, 2, d_in // 2, 3)
        assert b.addressable_shards[0].data.shape == (2, 2, 3, d_out // 2)


@pytest.mark.parametrize("scheme", ["int8", pytest.param("nf4_double", marks=pytest.mark.slow)])
def test_quantized_experts(scheme, tmp_path):
    """A base read into codes is the one quantized later, experts included; its adapter merges to what it computes."""
    models.save(build(CONFIG, "CAUSAL_LM"), tmp_path)
    loaded = models.load(tmp_path, quantize=scheme)
    jax.tree.map(np.testing.assert_array_equal, flat(loaded), flat(jpeft.quantize(models.load(tmp_path), scheme)))
    assert any("experts/w2/kernel/" in path for path in flat(loaded))
    model = jpeft.combine(*adapted(loaded))
    assert_close(outputs_of(model, **batch(MIXTRAL)), outputs_of(jpeft.merge(model), **batch(MIXTRAL)))
    place = jpeft.placement(jpeft.mesh("tensor=2", devices=jax.devices()[:2]), uneven="whole")
    codes = {p: leaf for p, leaf in flat(loaded).items() if p.endswith("experts/w1/kernel/codes")}
    assert all(place(p, jnp.asarray(leaf)).spec[-3] == "tensor" or leaf.shape[1] % 2 for p, leaf in codes.items())


def test_generation_with_experts_is_that_without_a_cache():
    """Greedy tokens with a cache are those of whole passes, with an adapter on the experts."""
    model = jpeft.combine(*adapted(build(CONFIG, "CAUSAL_LM")))
    prompt = np.random.default_rng(0).integers(3, 53, (2, 5))
    found = np.asarray(models.generate(model, prompt, max_new_tokens=4, eos_token_id=None))
    whole = outputs_of(model, input_ids=np.concatenate([prompt, found], 1))
    np.testing.assert_array_equal(found, whole[:, 4:-1].argmax(-1))


@pytest.mark.parametrize("kind", ["cpu", pytest.param("gpu", marks=pytest.mark.slow)])
def test_adapters_in_a_bank_are_each_its_own(kind, monkeypatch):
    monkeypatch.setattr(_grouped, "platform", lambda: kind)
    base = build(CONFIG, "CAUSAL_LM")
    one, two = (jpeft.combine(*adapted(base, seed)) for seed in (1, 2))
    inputs = {name: value[[0, 0, 0]] for name, value in batch(MIXTRAL).items()}
    bank, ids = jpeft.bank([one, two]), jnp.array([1, 0, 2])
    together = jpeft.apply_bank(bank, ids, lambda model, row: model(**row), inputs)
    for row, model in enumerate((one, base, two)):
        assert_close(together[row], outputs_of(model, **inputs)[row])


def test_a_scaled_adapter_on_experts():
    model = jpeft.combine(*adapted(build(CONFIG, "CAUSAL_LM")))
    half = jpeft.scale(model, 0.5)
    assert_close(outputs_of(half, **batch(MIXTRAL)), outputs_of(jpeft.merge(half), **batch(MIXTRAL)))


def test_what_a_config_asks_for_is_refused():
    with pytest.raises(ValueError, match="output_router_logits=True makes transformers add router_aux_loss_coef"):
        mixtral.Config.from_hf({"model_type": "mixtral", "output_router_logits": True})
    with pytest.raises(ValueError, match="num_experts_per_tok is between 1 and num_local_experts; got 3 and 2"):
        mixtral.Config(num_local_experts=2, num_experts_per_tok=3)


def test_experts_are_the_last_of_a_projection_s_leading_axes():
    model = nnx.eval_shape(lambda: models.build(CONFIG, "CAUSAL_LM", key=jax.random.key(0)))
    found = {site.path: site for site in jpeft.sites(model)}["layers/block_sparse_moe/experts/w2"]
    assert (found.lead, found.d_in, found.d_out) == ((2, 5), 20, 24)
    assert found.names[6] == "model.layers.1.block_sparse_moe.experts.1.w2"
    assert seams.beside(model.layers.block_sparse_moe.experts.w2) == 1
