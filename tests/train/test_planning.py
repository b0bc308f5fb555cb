# SPDX-License-Identifier: Apache-2.0
"""`jpeft plan`: what a step takes by shape, against the same step compiled and against published figures."""

import json

import jax
import jax.numpy as jnp
import pytest

import jpeft
from jpeft.train.cli import main
from jpeft.train.losses import SUMS
from jpeft.train.planning import advice, compiling, devices, report, table, trace
from jpeft.train.planning.devices import GIB
from jpeft.train.planning.estimate import estimate, memory
from jpeft.train.planning.request import Request
from jpeft.train.planning.subject import adapted, subject
from jpeft.train.sections import Optimizer
from jpeft.train.step import make_step

#: Total by shape against the compiled step's, relative: what is guessed of a compiler's own working memory.
CLOSE = 0.10

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
LORA = {"kind": "lora", "rank": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
FULL = {"kind": "full"}
PREFIX = {"kind": "prefix_tuning", "num_tokens": 20}


@pytest.fixture(scope="module", name="small")
def _small(tmp_path_factory):
    """A config.json; no weights are needed."""
    file = tmp_path_factory.mktemp("model") / "config.json"
    file.write_text(json.dumps(CONFIG))
    return str(file)


def request_of(model, method=LORA, where="cpu", count=1, **options):
    machine = devices.topology(where) if ":" in where or "-" in where else devices.machine(where, count)
    return Request(model, method, machine, **{"batch": 4, "seq": 64, "dtype": "float32", **options})


# ------------------------------------------------------------------------------------------- memory, against compilers

CASES = {
    "lora": (LORA, "none", 1, None),
    "lora, full remat": (LORA, "full", 1, None),
    "lora, dots": (LORA, "dots", 1, None),
    "full": (FULL, "none", 1, None),
    "prefix": (PREFIX, "none", 1, None),
    "lora, fsdp": (LORA, "none", 4, "fsdp=4"),
    "lora, fsdp and tensor": (LORA, "none", 4, "fsdp=2,tensor=2"),
    "lora, sequence": (LORA, "none", 8, "fsdp=2,sequence=4"),
    "lora, sequence, full remat": (LORA, "full", 8, "fsdp=2,sequence=4"),
    "lora, all four axes": (LORA, "full", 8, "data=1,fsdp=2,sequence=2,tensor=2"),
    "full, sequence": (FULL, "none", 8, "fsdp=2,sequence=2,tensor=2"),
    "prefix, sequence": (PREFIX, "none", 8, "data=2,sequence=4"),
}


@pytest.mark.parametrize("case", [c if c == "lora" else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_memory_by_shape_is_the_compiled_programs(small, case, optimised):
    method, remat, count, mesh = CASES[case]
    asked = request_of(small, method, count=count, mesh=mesh, remat=remat, batch=4 * min(count, 2), seq=256)
    found, program = memory(subject(asked)), compiling.compiled(asked)
    assert abs(found.total / program.total - 1) < CLOSE, (found, program)
    parts = found.weights + found.adapters + found.optimizer
    batch = 3 * asked.batch * asked.seq * 4 // subject(asked).ways  # tokens of a row are on all devices along sequence
    assert abs(program.arguments - parts - batch) < 100, "what stays is counted exactly, but for padding of scalars"


def test_what_is_kept_in_host_memory_is_not_the_devices(small):
    """By hand: of each of 6 layers, its input, and what its attention gives, of 4 rows of 64 tokens in bfloat16."""
    options = {"where": "v5e-1", "dtype": "bfloat16"}
    there, named = (memory(subject(request_of(small, LORA, **options, remat=how))) for how in ("offload", "names"))
    arrays = 6 * 4 * 64 * 256 * 2
    assert there.host == 2 * arrays
    assert named.host == 0
    assert there.activations == named.activations - there.host
    assert there.working == named.working + 2 * there.host // 6  # one layer's in use, and the next one's on their way


def test_the_parts_of_a_step_have_the_bytes_of_their_shapes(small):
    """By hand: parameters of a Llama, float32, and AdamW's two moments of what LoRA trains."""
    layer = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 688 + 2 * 256
    base = 6 * layer + 2 * 2048 * 256 + 256
    lora = 6 * 16 * (2 * (256 + 256) + 2 * (256 + 128))
    found = memory(subject(request_of(small)))
    assert (found.weights, found.adapters, found.gradients) == (4 * base, 4 * lora, 4 * lora)
    assert 0 <= found.optimizer - 8 * lora < 100  # counts
    halves = memory(subject(request_of(small, count=2, batch=2)))
    assert halves.weights < 0.51 * found.weights
    codes = memory(subject(request_of(small, quantize="nf4")))
    kernels = 6 * (layer - 2 * 256)
    assert codes.weights == 4 * (base - kernels) + kernels // 2 + kernels // 64 * 4


def test_what_no_axis_divides_is_not_gathered(small):
    """Scales of nf4 have four rows here, which 8 devices keep whole; the largest kernel is then that of the codes."""
    found = subject(request_of(small, count=8, mesh="fsdp=8", batch=8, quantize="nf4"))
    assert found.frozen["layers/self_attn/q_proj/kernel/scales"].sharding.is_fully_replicated
    codes, decoded, logits, widest = 256 * 688 // 2, 8 * 256 * 688 * 4, 64 * 2048 * 10, 64 * 688 * 4
    assert memory(found).working == 2 * codes + decoded + logits + widest


def test_copies_of_weights_lie_as_the_weights(small):
    """Trained in float32 and multiplied in bfloat16: what is kept of that is each device's own part."""
    options = {"count": 8, "mesh": "fsdp=8", "batch": 8, "dtype": "bfloat16", "remat": "full"}
    full, lora = (memory(subject(request_of(small, method, **options))) for method in (FULL, LORA))
    assert abs(full.activations - lora.activations) < 1.5 * full.weights  # a device's share of the base, in bfloat16


def test_tokens_are_split_and_keys_are_not(small):
    """By hand: what four devices along `sequence` keep of a stack of layers; float32."""
    whole, split = (
        memory(subject(request_of(small, count=n, mesh=f"sequence={n}", batch=1, seq=1024))).activations for n in (1, 4)
    )
    keys = 2 * 6 * 1024 * 4 * 32 * 4  # keys and values of 6 layers, 4 heads of 32
    frequencies = 1024 * 16 * 2 * 4
    copies = 3 * 6 * (256 + 2 * 128) * 16 * 4  # at most: adapters in the order of the products
    assert abs(split - (keys + (whole - keys) / 4)) < frequencies + copies


def test_a_state_in_host_memory(small):
    """AdamW's moments are not on the device but while an update is made, when what layers keep is gone."""
    options = {"where": "v5e-1", "seq": 64, "batch": 1}
    here = memory(subject(request_of(small, FULL, **options)))
    there = memory(subject(request_of(small, FULL, **options, optimizer=Optimizer(offload=True))))
    assert (there.optimizer, there.host, there.fetched) == (0, here.optimizer, here.optimizer)
    stays = here.weights + here.adapters + here.gradients
    assert here.total == stays + here.optimizer + here.activations + here.working
    assert there.total == stays + max(here.optimizer, here.activations + here.working)
    on_cpu = memory(subject(request_of(small, FULL, optimizer=Optimizer(offload=True))))
    assert (on_cpu.host, on_cpu.total) == (0, memory(subject(request_of(small, FULL))).total)


def test_rules_and_averages_have_their_states(small):
    """Numbers by hand: AdamW two a trained one, lion and sgd one; an average is another."""
    trained = memory(subject(request_of(small))).adapters
    for name, numbers in (("adamw", 2), ("lion", 1), ("sgd", 1)):
        found = memory(subject(request_of(small, optimizer=Optimizer(name=name))))
        assert 0 <= found.optimizer - numbers * trained < 100
    averaged = memory(subject(request_of(small, ema=True)))
    assert averaged.optimizer == memory(subject(request_of(small))).optimizer + trained


def test_a_cache_is_counted(small):
    found = memory(subject(request_of(small, dtype="bfloat16", generate=100)))
    assert found.cache == 2 * 6 * 4 * 100 * 4 * 32 * 2
    assert found.total == memory(subject(request_of(small, dtype="bfloat16"))).total


# -------------------------------------------------------------------------------------------------- products and FLOPs


def test_flops_are_those_of_the_formula(small):
    """2 N forward and 2 N for the gradient of what each product reads; the head and the first layer's input differ."""
    one = estimate(request_of(small, seq=64))
    kernels = 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 688) + 2048 * 256
    tokens = 4 * 64
    by_hand = 4.0 * tokens * kernels
    assert 0.98 < one.flops / by_hand < 1.15  # and attention, and the adapters' own
    assert one.convention == 4.0 * one.base * tokens
    full = estimate(request_of(small, FULL, seq=64))
    assert 0.98 < full.flops / (1.5 * by_hand) < 1.15  # 6 N
    assert full.convention == 6.0 * full.base * tokens
    remat = estimate(request_of(small, seq=64, remat="full"))
    assert 1.3 < remat.flops / one.flops < 1.55  # the layers run once more: 6 N


def test_a_loops_products_count_as_often_as_it_runs():
    def loop(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=7)[0]

    x, w = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 5), jnp.float32)
    assert trace.product_flops(loop, x, w) == 7 * 2 * 3 * 5 * 5
    assert trace.product_flops(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), x, w) == 300
    image, kernel = jax.ShapeDtypeStruct((2, 3, 8, 8), jnp.float32), jax.ShapeDtypeStruct((4, 3, 2, 2), jnp.float32)
    convolved = trace.product_flops(lambda x, k: jax.lax.conv(x, k, (2, 2), "VALID"), image, kernel)
    assert convolved == 2 * (2 * 4 * 4 * 4) * (3 * 2 * 2)


def test_what_a_derivative_keeps():
    w = jax.ShapeDtypeStruct((5, 4), jnp.float32)
    x = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    found = trace.kept(lambda w, x: jnp.sin(x @ w).sum(), w, x)
    assert sorted(f.shape for f in found) == [(3, 4)]  # the cosine; x is an argument


def test_no_frozen_kernel_has_a_gradients_product(small):
    """Neither as traced nor as compiled does a product give an array of a frozen kernel's shape."""
    odd = {"batch": 3, "seq": 33}  # 99 tokens, which no kernel has as a side
    model = subject(request_of(small, **odd))
    shapes = {leaf.shape[-2:] for path, leaf in model.frozen.items() if path.endswith("kernel")}
    shapes |= {shape[::-1] for shape in shapes}
    trained = gradient_products(model, shapes)
    assert not trained
    everything = gradient_products(subject(request_of(small, FULL, **odd)), shapes)
    assert len(everything) >= 7, "the same search finds those of a full fine-tuning"
    text = compiling.compiled(request_of(small, **odd)).text
    products = [line for line in text.splitlines() if " dot(" in line or "__onednn" in line or "custom-call(" in line]
    assert products
    for d_in, d_out in shapes:
        assert not [line for line in products if f"f32[{d_in},{d_out}]" in line.partition(" = ")[2].split(" ")[0]]


def gradient_products(model, shapes):
    """The products of a step that contract rows and positions and give one of `shapes`."""
    step = make_step(model.graphdef, SUMS["CAUSAL_LM"], model.tx)
    jaxpr = jax.make_jaxpr(lambda *given: step.update(*given, None))(model.state, model.frozen, model.batch).jaxpr
    return [p for p, _ in trace.products(jaxpr) if p.outvars[0].aval.shape in shapes]


# ------------------------------------------------------------------------------------------------- what was published


@pytest.mark.slow
def test_the_published_table_of_a_7b():
    """LoRA about 16.3 GB at 4 x 512, full fine-tuning about 100 GB, both without a word on activations."""
    lora = memory(subject(Request("llama-2-7b", LORA, devices.machine("a100", 1), batch=4, seq=512, remat="full")))
    full = memory(subject(Request("llama-2-7b", FULL, devices.machine("a100", 1), batch=4, seq=512, remat="full")))
    assert 14.0 < lora.total / 1e9 < 16.3
    assert 100 < full.total / 1e9 < 150


# -------------------------------------------------------------------------------------------------- machines by name


@pytest.mark.parametrize(
    "name, grid, count",
    [
        ("v5e-8", "v5e:2x4", 8),
        ("v5e-256", "v5e:16x16", 256),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-64", "v5p:2x4x4", 32),
        ("v6e:2x4", "v6e:2x4", 8),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 8),
    ],
)
def test_a_slice_has_its_devices(name, grid, count):
    found = devices.topology(name)
    assert (found.topology, found.count) == (grid, count)


@pytest.mark.parametrize(
    "name, message",
    [
        ("", "a topology is a family and a grid"),
        ("v5x:2x4", "unknown TPU 'v5x' in 'v5x:2x4'; did you mean v5"),
        ("v5e-7", "there is no slice v5e-7; there are v5e-1, v5e-4, v5e-8"),
        ("v5p-9", "there is no slice v5p-9; there are v5p-8"),
        ("v5p:2x4", "a slice of v5p is a grid of 3 sides"),
    ],
)
def test_a_slice_that_is_none_is_refused(name, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        devices.topology(name)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": "llama-2-7"}, "is no preset, folder or config.json; did you mean llama-2-7b"),
        ({"method": {"kind": "lorra"}}, "unknown method 'lorra'; did you mean lora"),
        ({"method": {"kind": "lora", "rnk": 8}}, "lora has no option 'rnk'; did you mean rank"),
        ({"mesh": "fsdp=3"}, "takes 3 devices; there are 4"),
        ({"batch": 6}, "a batch of 6 rows does not divide by the 4 devices"),
    ],
)
def test_a_request_that_cannot_be_is_refused(small, options, message):
    asked = {"model": small, "method": LORA, "count": 4, **options}
    with pytest.raises(ValueError, match=message):
        subject(request_of(asked.pop("model"), asked.pop("method"), **asked))


@pytest.mark.parametrize("options", [{"batch": 0}, {"share": 0.0}, {"generate": -1}])
def test_a_number_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match=r"must be|is the part"):
        request_of("llama-2-7b", **options)


# ------------------------------------------------------------------------------------------------------------- advice


@pytest.mark.slow
def test_where_it_does_not_fit_each_change_says_what_it_leads_to(small):
    tight = devices.Machine(devices.Chip("tight", "cuda", 0.09 * GIB, 1e12, 1e11, "made up"), 1)
    asked = request_of(small, seq=256).but(machine=tight)
    assert estimate(asked).fits is False
    found = advice.changes(asked)
    by_name = {change.what: change.then for change in found}
    assert set(by_name) >= {"--remat full", "--batch 2 --accumulation 2", "--dtype bfloat16", "--quantize nf4"}
    assert by_name["--remat full"].memory.total == memory(subject(asked.but(remat="full"))).total
    fits = [bool(change.then.fits) for change in found]
    assert fits == sorted(fits, reverse=True)
    assert fits[0]
    assert "it does not fit" in report.lines(estimate(asked), None, found)


@pytest.mark.slow
def test_where_no_change_alone_is_enough_several_are_tried(small):
    tight = devices.Machine(devices.Chip("tight", "cuda", 0.02 * GIB, 1e12, 1e11, "made up"), 1)
    found = advice.changes(request_of(small, seq=256).but(machine=tight))
    assert found[0].then.fits
    assert "--remat full" in found[0].what


@pytest.mark.slow
def test_a_table_names_the_most_rows(small):
    has = 0.1 * GIB
    tight = devices.Machine(devices.Chip("tight", "cuda", has, 1e12, 1e11, "made up"), 1)
    asked = request_of(small, remat="full").but(machine=tight)
    rows = table.most_rows(asked, (64, 256))
    for length, most in rows.items():
        at = asked.but(seq=length)
        assert memory(subject(at.but(batch=most))).total <= has
        assert most == table.MOST_ROWS or memory(subject(at.but(batch=2 * most))).total > has
    assert rows[64] >= rows[256] > 0
    none = asked.but(machine=devices.Machine(devices.Chip("none", "cuda", 1.0, 1e12, 1e11, "made up"), 1))
    assert table.most_rows(none, (64,)) == {64: 0}
    with pytest.raises(ValueError, match="nobody said how much memory cpu has"):
        table.most_rows(request_of(small), (64,))


# -------------------------------------------------------------------------------------------------------- the program


def test_the_command_prints_a_plan(small, capsys):
    main(["plan", "--model", small, "--rank", "4", "--batch", "2", "--seq", "32", "--device", "h100", "--no-compile"])
    out = capsys.readouterr().out
    assert "lora (rank=4)" in out
    assert "2 rows of 32 tokens on 1 x h100" in out
    assert "tokens/s, if products reach 40% of 989 TFLOP/s" in out
    main(["plan", "--model", small, "--targets", "all-linear", "--seq", "32", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (
        found["trainable"]
        == jpeft.summary(adapted(request_of(small, {"kind": "lora", "targets": "all-linear"}))).trainable
    )
    assert found["compiled"]["total"] > found["by_shape"]["weights"]


def test_a_classifier_of_images_is_planned_by_what_its_model_makes_of_an_image(tmp_path, capsys):
    """By hand: of 4 images a convolution, six layers, a head; forward once, backward twice, but for the image's own."""
    file = tmp_path / "config.json"
    sizes = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    file.write_text(json.dumps({"model_type": "vit", "image_size": 128, "patch_size": 8, **sizes}))
    main(["plan", "--model", str(file), "--task", "IMAGE_CLS", "--method", "full", "--batch", "4", "--dtype", "float32",
          "--json"])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    tokens, d, d_ff = 1 + 16 * 16, 192, 768
    layer = 2 * tokens * (4 * d * d + 2 * d * d_ff) + 4 * tokens * tokens * d
    image, head = 2 * (tokens - 1) * 3 * 8 * 8 * d, 2 * d * 2
    again = 6 * 2 * tokens * tokens * d  # scores are computed once more on the way back
    assert found["request"]["seq"] == tokens
    assert found["flops"] == pytest.approx(4 * (3 * (6 * layer + head) + 2 * image + again), rel=0.005)
    stays = sum(found["by_shape"][part] for part in ("weights", "adapters", "optimizer"))
    assert abs(found["compiled"]["arguments"] - stays - 4 * 4 * (3 * 128 * 128 + 1)) < 100


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "IMAGE_CLS", "--seq", "9"], "--seq is of texts; what a model for IMAGE_CLS reads has the size of"),
        (["--mesh", ""], "mesh is empty; give axes such as fsdp=4,tensor=2"),
        (["--model", ""], "model is empty; give a preset's name"),
        (["--rank", "99999999"], "LoRA's rank must be at most 1,048,576, got 99999999"),
        (["--topology", "v5e-8", "--devices", "4"], "--topology says how many devices there are"),
        (["--topology", ""], "a topology is a family and a grid, as v5e:2x4"),
        (["--batch", "100000000000000"], "100000000000000 rows of 512 tokens are 51200000000000000 in one micro-batch"),
        (["--set", "rank"], "--set takes OPTION=VALUE, got 'rank'"),
        (["--rank", "4", "--set", "rank=8"], "--set rank=8: the method has rank=4 already; give it once"),
        (["--set", "kind=dora"], "--set kind=dora: the method has kind=lora already"),
        (["--targets", ","], "--targets takes all-linear, or names with commas between them, got ','"),
        (["--device", "h1000"], "unknown device 'h1000'; did you mean h100"),
    ],
)
def test_a_wrong_call_is_one_line(small, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--model", small, *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_no_json_is_named(tmp_path, capsys):
    (tmp_path / "empty.json").touch()
    with pytest.raises(SystemExit):
        main(["plan", "--model", str(tmp_path / "empty.json"), "--no-compile"])
    assert "empty.json is no config.json of a model: " in capsys.readouterr().err
