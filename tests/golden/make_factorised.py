#!/usr/bin/env python3
"""Makes tests/golden/models/welore and maestro: tiny checkpoints whose linear layers are stored as products of two matrices, and
what Hugging Face transformers says of the products.

Rerun, from anywhere (the results are committed; the test suite never runs this):

    /tmp/golden/bin/python tests/golden/make_factorised.py        # the environment of make_models.py

Both begin as tests/golden/models/llama-bias, in float32.

- `welore` (https://github.com/VITA-Group/welore): all linear layers but three are `U.weight [out, k]` times `V.weight [k, in]`, made
  by truncated singular value decomposition, of ranks that differ; the three stay `.weight`.
- `maestro` (https://github.com/SamuelHorvath/Maestro-LoD): every linear layer but one of a decoder layer is `in_network.weight [m, in]`
  followed by `out_network.weight [out, m]` and `out_network.bias`, with `m = min(in, out)` as an unpruned model stores it. Ranks that
  training gave up keep weights of about 1e-8, scattered among the others. One layer keeps nearly all ranks, so that its product
  is larger than the matrix.

expected.json has, for prompts of 5, 65 and 130 tokens, the logits after the last token and the log-probabilities of the prompt,
as tests/golden/make_adapters.py writes them, of the model with the products multiplied out (Maestro's without the ranks given up).
"""

import json
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

MODELS = Path(__file__).resolve().parent / "models"
BASE = MODELS / "llama-bias"
TINY = 1e-8
DENSE = ("0.self_attn.k_proj", "1.self_attn.v_proj", "1.mlp.down_proj")


def rng_for(*labels):
    return np.random.Generator(np.random.PCG64(zlib.crc32("/".join(map(str, labels)).encode())))


def digits(values):
    return [float(f"{v:.7g}") for v in values]


def main():
    torch.set_num_threads(1)
    for form in ("welore", "maestro"):
        model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager").eval()
        stored = {}
        for name, parameter in model.state_dict().items():
            path = name.removesuffix(".weight")
            linear = path.endswith("_proj") and name.endswith(".weight")
            if not linear or (form == "welore" and path.endswith(DENSE)) or (form == "maestro" and name.endswith("1.mlp.gate_proj.weight")):
                stored[name] = parameter.clone()
                continue
            rng = rng_for(form, name)
            u, s, v = np.linalg.svd(parameter.double().numpy(), full_matrices=False)
            m = len(s)
            if form == "welore":
                k = int(rng.integers(m // 4, m // 2))
                left, right = u[:, :k] * np.sqrt(s[:k]), np.sqrt(s[:k])[:, None] * v[:k]
                left, right = left.astype(np.float32), right.astype(np.float32)
                stored[path + ".U.weight"], stored[path + ".V.weight"] = torch.from_numpy(left.copy()), torch.from_numpy(right.copy())
            else:
                keep = m - 2 if path.endswith("layers.0.self_attn.o_proj") else int(rng.integers(m // 4, m // 2))
                left, right = u * np.sqrt(s), np.sqrt(s)[:, None] * v
                lost = rng.permutation(m)[: m - keep]
                left[:, lost] = rng.normal(0.0, TINY, (left.shape[0], len(lost)))
                right[lost] = rng.normal(0.0, TINY, (len(lost), right.shape[1]))
                left, right = left.astype(np.float32), right.astype(np.float32)
                stored[path + ".out_network.weight"] = torch.from_numpy(left.copy())
                stored[path + ".in_network.weight"] = torch.from_numpy(right.copy())
                kept = np.setdiff1d(np.arange(m), lost)
                left, right = left[:, kept], right[kept]
            parameter.copy_(torch.from_numpy((left.astype(np.float64) @ right.astype(np.float64)).astype(np.float32)))
        if form == "maestro":
            for name in [n for n in stored if n.endswith("_proj.bias")]:
                path = name.removesuffix(".bias")
                if path + ".out_network.weight" in stored:
                    stored[path + ".out_network.bias"] = stored.pop(name)
        folder = MODELS / form
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file in ("config.json", "generation_config.json"):
            shutil.copy(BASE / file, folder / file)
        save_file({k: v.contiguous() for k, v in stored.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        cases = []
        for length in (5, 65, 130):
            ids = rng_for(form, "prompt", length).integers(0, model.config.vocab_size, length).tolist()
            with torch.no_grad():
                logits = model(torch.tensor([ids]), use_cache=False).logits[0]
            logp = torch.log_softmax(logits.double(), -1)
            cases.append({"prompt": ids, "logits": digits(logits[-1]),
                          "logprobs": digits(logp[i, ids[i + 1]] for i in range(length - 1))})
        lines = ",\n".join("  " + json.dumps(c) for c in cases)
        made = json.dumps({"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]})
        (folder / "expected.json").write_text('{"made_with": %s, "cases": [\n%s\n]}\n' % (made, lines))
        print(form, sum(f.stat().st_size for f in folder.iterdir()) // 1024, "KiB")


if __name__ == "__main__":
    sys.exit(main())
