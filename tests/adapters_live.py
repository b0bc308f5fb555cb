# SPDX-License-Identifier: Apache-2.0
"""Run by an interpreter that has `adapters`: loads folders that jpeft wrote, and says what the library made of them.

  python adapters_live.py JOBS.json OUTPUTS.npz

A job names a checkpoint's folder (`base`), transformers' class (`model_class`), the adapter's folder (`adapter`), and
whether the rows are padded. Of each are saved the output, what `loading_info` says, and the tensors that are not on the
model as they are in the file.
"""

import json
import sys
from pathlib import Path

import adapters  # pyright: ignore[reportMissingImports]
import numpy as np
import safetensors.torch
import torch
import transformers


def opened(job):
    """(the model with the adapter active, what was said while loading)."""
    folder, said = Path(job["adapter"]), {}
    options = {"num_labels": 3} if "Classification" in job["model_class"] else {}
    make = getattr(transformers, job["model_class"]).from_pretrained
    model = make(job["base"], attn_implementation="eager", **options)
    adapters.init(model)
    if (folder / "adapter_setup.json").is_file():
        setup, _ = model.load_adapter_setup(str(folder), use_safetensors=True)
        model.set_active_adapters(setup)
    else:
        name = model.load_adapter(str(folder), use_safetensors=True, loading_info=said)
        model.set_active_adapters(name)
    # Every layer has each tensor of a prefix once more, under another name: the same tensor, which is loaded.
    said["missing_keys"] = [key for key in said.get("missing_keys", ()) if ".prefix_tuning.pool." not in key]
    return model.eval(), said


def differing(model, folder):
    """Names of the file's tensors that the model lacks, or has with other values."""
    state, base = model.state_dict(), f"{model.base_model_prefix}."
    found = []
    for file in sorted(folder.rglob("*.safetensors")):
        for name, tensor in safetensors.torch.load_file(file).items():
            there = state.get(name, state.get(name.removeprefix(base)))
            if there is None or not torch.equal(there, tensor):
                found.append(name)
    return found


def main(jobs, target):
    transformers.logging.set_verbosity_error()
    found = {}
    for name, job in json.loads(Path(jobs).read_text()).items():
        model, said = opened(job)
        batch = {"input_ids": torch.tensor(job["ids"])}
        if job["padded"]:
            batch["attention_mask"] = torch.tensor(job["mask"])
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = batch["input_ids"].flip(-1)
        with torch.no_grad():
            out = model(**batch)
        found[f"{name}/output"] = (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()
        said["differing_keys"] = differing(model, Path(job["adapter"]))
        found[f"{name}/said"] = np.array(json.dumps({key: value for key, value in said.items() if value}))
    np.savez(target, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
