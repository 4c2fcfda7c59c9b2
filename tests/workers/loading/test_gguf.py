"""GGUF: every tensor type, names and layouts of the architectures, broken files."""

import json

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from shoal.workers.config import LoadConfig
from shoal.workers.loading import gguf as loading
from shoal.workers.loading import iterate_weights
from shoal.workers.loading.gguf_file import read_gguf

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 256, 2, 8, 2, 32, 48

# Largest error of a value that a type allows when the largest of its block is 1.
ERROR = {
    Type.F32: 0.0,
    Type.F16: 1e-3,
    Type.BF16: 1 / 256,
    Type.Q8_0: 1 / 200,
    Type.Q5_0: 1 / 15,
    Type.Q5_1: 1 / 15,
    Type.Q4_0: 1 / 7,
    Type.Q4_1: 1 / 7,
}
# The gguf package cannot write these: blocks are made by hand. Type -> where the float16 scales are in a block.
SCALES_AT = {Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}


def hand_made(kind, rows, columns, seed=0):
    """Random valid blocks: every bit pattern is a number once the float16 scales are finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    for at in SCALES_AT[kind]:
        scale = generator.uniform(0.001, 0.01, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def llama_names():
    names = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        names |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_gate.weight": (512, HIDDEN),
            f"blk.{i}.ffn_up.weight": (512, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, 512),
        }
    return names


def write(path, arch, tensors, layers=LAYERS):
    """tensors: name -> float32 array, or (packed array, type)."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(layers)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sources(path):
    return {source.name: source for source in iterate_weights(LoadConfig(str(path)))}


def floats(shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def check_narrow(source):
    whole = source.load()
    assert whole.dtype == torch.float32
    assert tuple(whole.shape) == source.shape
    for dim, size in enumerate(source.shape):
        for start, length in ((0, size), (0, 1), (5, 17), (size - 9, 9), (32, 32)):
            if start + length <= size:
                part = source.narrow(dim, start, length)
                assert torch.equal(part, whole.narrow(dim, start, length)), (source.name, dim, start, length)
    return whole


@pytest.mark.parametrize("kind", [*ERROR, *SCALES_AT], ids=lambda kind: kind.name)
@pytest.mark.parametrize("chunk", [loading.CHUNK_BYTES, 3 * 4 * HIDDEN])
def test_every_type(tmp_path, monkeypatch, kind, chunk):
    monkeypatch.setattr(loading, "CHUNK_BYTES", chunk)  # three rows at a time as well as all at once
    shape = (VOCAB, HIDDEN)
    wanted = floats(shape)
    packed = hand_made(kind, *shape) if kind in SCALES_AT else gguf.quantize(wanted, kind)
    path = write(tmp_path / "a.gguf", "qwen3", {"token_embd.weight": (packed, kind)})
    loaded = check_narrow(sources(path)["model.embed_tokens.weight"])
    assert torch.equal(loaded, torch.from_numpy(np.array(gguf.dequantize(packed, kind))))
    if kind in ERROR:
        assert (loaded - torch.from_numpy(wanted)).abs().max() <= ERROR[kind]


def test_q4_k_against_the_format_as_written_down(tmp_path):
    """One block taken apart by hand: value = d * scale * quant - dmin * min, 6-bit scales in 12 bytes."""
    block = hand_made(Type.Q4_K, 1, 256)[0]
    d, dmin = block[:4].view(np.float16).astype(np.float64)
    packed, quants = block[4:16].astype(int), block[16:].astype(int)
    wanted = []
    for group in range(8):
        if group < 4:
            scale, low = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = packed[group + 4] & 15 | (packed[group - 4] >> 6) << 4
            low = packed[group + 4] >> 4 | (packed[group] >> 6) << 4
        nibbles = quants[32 * (group // 2) : 32 * (group // 2) + 32] >> 4 * (group % 2) & 15
        wanted.append(d * scale * nibbles - dmin * low)
    path = write(tmp_path / "a.gguf", "qwen3", {"token_embd.weight": (block[None], Type.Q4_K)})
    loaded = sources(path)["model.embed_tokens.weight"].load()
    torch.testing.assert_close(loaded[0].double(), torch.from_numpy(np.concatenate(wanted)), rtol=1e-5, atol=1e-6)


def llama_cpp_permute(weights, heads):
    """What llama.cpp's converter does to q and k (LlamaModel.permute)."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


@pytest.mark.parametrize("arch", ["llama", "granite"])
def test_llama_names_and_permutation(tmp_path, arch):
    checkpoint, tensors = {}, {}
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], LAYERS)
    for i, (name, shape) in enumerate(llama_names().items()):
        tensors[name] = checkpoint[name] = floats(shape, i)
        if "attn_q." in name or "attn_k." in name:
            tensors[name] = llama_cpp_permute(checkpoint[name], HEADS if "attn_q." in name else KV_HEADS)
            assert not np.array_equal(tensors[name], checkpoint[name])
    found = sources(write(tmp_path / "a.gguf", arch, tensors))
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= found.keys()
    assert {f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkvo"} <= found.keys()
    assert {f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down")} <= found.keys()
    assert len(found) == len(tensors)
    for name, source in found.items():
        ours = f"{table.get_name(name.removesuffix('.weight'))}.weight"
        assert torch.equal(check_narrow(source), torch.from_numpy(checkpoint[ours])), name


def test_permuted_biases_and_quantized_rows(tmp_path):
    weight, bias = floats((HEADS * HEAD_DIM, HIDDEN)), floats((HEADS * HEAD_DIM,), 1)
    packed = gguf.quantize(llama_cpp_permute(weight, HEADS), Type.Q8_0)
    tensors = {"blk.0.attn_q.weight": (packed, Type.Q8_0), "blk.0.attn_q.bias": llama_cpp_permute(bias, HEADS)}
    found = sources(write(tmp_path / "a.gguf", "llama", tensors))
    loaded = check_narrow(found["model.layers.0.self_attn.q_proj.weight"])
    assert (loaded - torch.from_numpy(weight)).abs().max() <= ERROR[Type.Q8_0]
    assert torch.equal(check_narrow(found["model.layers.0.self_attn.q_proj.bias"]), torch.from_numpy(bias))


def test_unpermute_is_transformers_convention():
    pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    processor = LlamaTensorProcessor({"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS})
    for name, heads in (("blk.0.attn_q.weight", HEADS), ("blk.0.attn_k.weight", KV_HEADS)):
        weights = floats((heads * HEAD_DIM, 16))
        theirs = processor.process(weights, name).weights
        assert torch.equal(loading.unpermute(torch.from_numpy(weights), heads), torch.from_numpy(np.array(theirs)))


def test_qwen3_keeps_rows_and_has_head_norms(tmp_path):
    shapes = llama_names() | {"blk.0.attn_q_norm.weight": (HEAD_DIM,), "blk.0.attn_k_norm.weight": (HEAD_DIM,)}
    tensors = {name: floats(shape, i) for i, (name, shape) in enumerate(shapes.items())}
    found = sources(write(tmp_path / "a.gguf", "qwen3", tensors))
    loaded = found["model.layers.1.self_attn.q_proj.weight"].load()
    assert torch.equal(loaded, torch.from_numpy(tensors["blk.1.attn_q.weight"]))
    assert torch.equal(
        found["model.layers.0.self_attn.k_norm.weight"].load(), torch.from_numpy(tensors["blk.0.attn_k_norm.weight"])
    )


def test_gpt2_conv1d_is_transposed_back(tmp_path):
    checkpoint = {
        "transformer.wte.weight": floats((VOCAB, HIDDEN), 1),
        "transformer.wpe.weight": floats((64, HIDDEN), 2),
        "transformer.ln_f.bias": floats((HIDDEN,), 3),
        "transformer.h.0.ln_1.weight": floats((HIDDEN,), 4),
        "transformer.h.0.attn.c_attn.weight": floats((HIDDEN, 3 * HIDDEN), 5),
        "transformer.h.0.attn.c_attn.bias": floats((3 * HIDDEN,), 6),
        "transformer.h.0.attn.c_proj.weight": floats((HIDDEN, HIDDEN), 7),
        "transformer.h.1.mlp.c_fc.weight": floats((HIDDEN, 4 * HIDDEN), 8),
        "transformer.h.1.mlp.c_proj.weight": floats((4 * HIDDEN, HIDDEN), 9),
        "lm_head.weight": floats((VOCAB, HIDDEN), 10),
    }
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, LAYERS)
    tensors = {}
    for name, values in checkpoint.items():
        module, _, ending = name.rpartition(".")
        conv = ".c_" in name and ending == "weight"
        tensors[f"{table.get_name(module)}.{ending}"] = np.ascontiguousarray(values.T) if conv else values
    found = sources(write(tmp_path / "a.gguf", "gpt2", tensors))
    assert found.keys() == checkpoint.keys()
    for name, source in found.items():
        assert torch.equal(check_narrow(source), torch.from_numpy(checkpoint[name])), name


def test_quantized_conv1d(tmp_path):
    values = floats((HIDDEN, 3 * HIDDEN))
    packed = gguf.quantize(np.ascontiguousarray(values.T), Type.Q8_0)
    found = sources(write(tmp_path / "a.gguf", "gpt2", {"blk.0.attn_qkv.weight": (packed, Type.Q8_0)}))
    loaded = check_narrow(found["transformer.h.0.attn.c_attn.weight"])
    assert (loaded - torch.from_numpy(values)).abs().max() <= ERROR[Type.Q8_0]


def test_narrow_reads_only_the_rows_it_needs(tmp_path, monkeypatch):
    packed = gguf.quantize(floats((VOCAB, HIDDEN)), Type.Q4_0)
    source = sources(write(tmp_path / "a.gguf", "qwen3", {"token_embd.weight": (packed, Type.Q4_0)}))[
        "model.embed_tokens.weight"
    ]
    seen = []
    dequantize = loading.GgufSource._dequantize
    monkeypatch.setattr(
        loading.GgufSource, "_dequantize", lambda self, part: (seen.append(part.shape), dequantize(self, part))[1]
    )
    source.narrow(0, 10, 3)
    source.narrow(1, 33, 40)  # entries 33..72 lie in blocks 1 and 2 of 32
    assert seen == [(3, HIDDEN // 32 * 18), (VOCAB, 2 * 18)]


def test_tensors_that_are_skipped_or_unknown(tmp_path):
    base = {"token_embd.weight": floats((VOCAB, HIDDEN))}
    found = sources(write(tmp_path / "a.gguf", "llama", base | {"rope_freqs.weight": floats((16,))}))
    assert list(found) == ["model.embed_tokens.weight"]
    path = write(tmp_path / "b.gguf", "llama", base | {"blk.0.ffn_gate_exps.weight": floats((4, 8))})
    with pytest.raises(ValueError, match=r"b\.gguf: no place in llama is known for tensor 'blk\.0\.ffn_gate_exps"):
        sources(path)
    with pytest.raises(ValueError, match=r"'mamba' is not supported, only \['gpt2', 'granite', 'llama', 'qwen3'\]"):
        sources(write(tmp_path / "c.gguf", "mamba", base))


def test_type_that_cannot_be_dequantized(tmp_path):
    path = write(tmp_path / "a.gguf", "llama", {"token_embd.weight": floats((VOCAB, HIDDEN)).astype(np.float64)})
    with pytest.raises(ValueError, match=r"'token_embd\.weight' is F64, which the gguf package cannot dequantize"):
        sources(path)["model.embed_tokens.weight"].load()


def test_broken_files_are_named(tmp_path):
    whole = write(tmp_path / "a.gguf", "llama", {"token_embd.weight": floats((VOCAB, HIDDEN))}).read_bytes()
    path = tmp_path / "broken.gguf"
    for content, reason in (
        (whole[:-100], "is cut short: tensor 'token_embd.weight' ends at byte"),
        (whole[:60], "no valid GGUF file"),
        (whole[:8], "no valid GGUF file"),
        (b"", "is no GGUF file: it is empty"),
        (b"PK\x03\x04" + whole[4:], "is no GGUF file: it starts with"),
        (whole[:4] + b"\x01\0\0\0" + whole[8:], "has GGUF version 1"),
        (whole.replace(b"general.architecture", b"general.architectura"), "does not state general.architecture"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"broken\.gguf.*{reason}"):
            sources(path)


def test_part_of_a_split_file_is_refused(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="one part of a split GGUF"):
        read_gguf(tmp_path / "a.gguf")


def test_header_is_what_ggufs_own_reader_says(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    for add, value in (("uint32", 7), ("float32", 0.5), ("bool", True), ("string", "ä b"), ("uint64", 1 << 40)):
        getattr(writer, f"add_{add}")(f"x.{add}", value)
    writer.add_array("x.strings", ["a", "", "日本"])
    writer.add_array("x.numbers", [1.5, -2.0])
    writer.add_tensor("token_embd.weight", floats((6, 32)))
    writer.add_tensor("output_norm.weight", floats((32,)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = read_gguf(tmp_path / "a.gguf"), gguf.GGUFReader(str(tmp_path / "a.gguf"))
    expected = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert json.dumps(ours.metadata, sort_keys=True) == json.dumps(expected, sort_keys=True)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.offset, mine.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert mine.shape == tuple(int(size) for size in reversed(tensor.shape))
