# SPDX-License-Identifier: Apache-2.0
"""What devices say to each other, read off compiled programs: how much, who, and what of it between slices."""

import json

import pytest
from contracts.models import LLAMA

from jpeft.train.planning import compiling, devices, exchange, report
from jpeft.train.planning.estimate import estimate, memory
from jpeft.train.planning.request import Request
from jpeft.train.planning.subject import subject

LORA = {"kind": "lora", "rank": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}


@pytest.fixture(scope="module", name="small")
def _small(tmp_path_factory):
    """A config.json; no weights are needed."""
    file = tmp_path_factory.mktemp("model") / "config.json"
    file.write_text(json.dumps(LLAMA))
    return str(file)


def test_collectives_are_read_off_a_program():
    text = """
      %a = bf16[8,512]{1,0:T(8,128)} all-gather(%p), dimensions={0}
      %b = (f32[4]{0}, f32[4]{0}) all-reduce-start(%x, %y), to_apply=%add
      %c = u8[64]{0} all-gather(%q), dimensions={0}
    """
    assert exchange.collectives(text) == {"all-gather": (2, 8 * 512 * 2 + 64), "all-reduce": (1, 32)}


@pytest.mark.parametrize(
    "said, groups",
    [
        ("replica_groups={{0,1},{2,3}}, to_apply=%add", [[0, 1], [2, 3]]),
        ("source_target_pairs={{1,0},{3,2}}", [[1, 0], [3, 2]]),
        ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1), x", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}, x", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}, x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("dimensions={0}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_who_speaks_with_whom_is_read_off_a_program(said, groups):
    assert sorted(map(sorted, exchange.groups(said, 8))) == sorted(map(sorted, groups))


def test_between_slices_only_gradients_are_summed(small):
    """Two slices of four: the weights are gathered within each, and the trained leaves' gradients over both."""
    machine = devices.Machine(devices.CHIPS["cpu"], 8, slices=2)
    asked = Request(small, LORA, machine, batch=8, seq=64, dtype="float32")
    assert asked.axes == "dcn.data=2,fsdp=-1"
    program, found = compiling.compiled(asked), memory(subject(asked))
    assert "all-gather" in program.collectives
    assert [*program.over_dcn] == ["all-reduce"]
    counts, gradients = 100, found.adapters // LLAMA["num_hidden_layers"]  # the loop over layers counts once
    assert gradients <= program.over_dcn["all-reduce"][1] < gradients + counts
    alike = asked.but(machine=devices.machine("cpu", 8), mesh="data=2,fsdp=4")
    assert found.total == memory(subject(alike)).total
    assert "over dcn    " in report.lines(estimate(asked), program)


def test_transfers_between_hosts_are_counted():
    text = """
      %r = (f32[16,8]{1,0}, u32[], token[]) recv(%t), channel_id=1, frontend_attributes={\
_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
      %a = f32[4]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
    """
    assert exchange.over_dcn(text, [0, 0, 1, 1]) == {"all-reduce": (1, 16 * 8 * 4)}
    assert exchange.over_dcn(text, [0, 1, 0, 1]) == {"all-reduce": (2, 16 * 8 * 4 + 16)}


def test_slices_that_the_machine_has_not(small):
    with pytest.raises(ValueError, match=r"the dcn axes of dcn.data=4,fsdp=2 make up 4 slices; the machine is 8 x cpu"):
        subject(Request(small, LORA, devices.machine("cpu", 8), mesh="dcn.data=4,fsdp=2", batch=8))
    with pytest.raises(ValueError, match="8 devices do not make up 3 slices"):
        devices.Machine(devices.CHIPS["cpu"], 8, slices=3)
