"""safetensors, PyTorch files, dummy weights, and the choice between them."""

import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shoal.workers.config import LoadConfig
from shoal.workers.loading import LOADERS, iterate_weights, load_weights, resolve_loader


def make_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed.weight": torch.randn(50, 12, generator=generator),
        "model.layers.0.proj.weight": torch.randn(24, 12, generator=generator).bfloat16(),
        "model.layers.0.norm.weight": torch.randn(12, generator=generator).half(),
        "lm_head.weight": torch.randn(50, 12, generator=generator),
    }


def save(tensors, path):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def save_sharded(tensors, folder, stem, ending):
    """Two shards and an index; returns the index's path."""
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:2], names[2:]), start=1):
        file = f"{stem}-{i:05d}-of-00002.{ending}"
        save({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def sources(folder, load_format="auto"):
    return {source.name: source for source in iterate_weights(LoadConfig(str(folder), load_format))}


def check(folder, tensors, load_format="auto"):
    found = sources(folder, load_format)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        source = found[name]
        assert source.shape == tuple(tensor.shape)
        loaded = source.load()
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor)
        for dim in range(tensor.dim()):
            for start, length in ((0, 5), (3, 7), (tensor.shape[dim] - 4, 4), (2, 0)):
                assert torch.equal(source.narrow(dim, start, length), tensor.narrow(dim, start, length))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "other.safetensors", "weights.bin"])
def test_single_file(tmp_path, name):
    save(make_tensors(), tmp_path / name)
    check(tmp_path, make_tensors())


@pytest.mark.parametrize(("stem", "ending"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_sharded(tmp_path, stem, ending):
    index = save_sharded(make_tensors(), tmp_path, stem, ending)
    check(tmp_path, make_tensors())
    # The index decides, also when other files lie beside the shards.
    save(make_tensors(1), tmp_path / f"stray.{ending}")
    check(tmp_path, make_tensors())
    # Without an index the shards are enough as long as all are there.
    index.unlink()
    (tmp_path / f"stray.{ending}").unlink()
    check(tmp_path, make_tensors())
    (tmp_path / f"{stem}-00002-of-00002.{ending}").unlink()
    with pytest.raises(ValueError, match="1 of 2 weight files and no index"):
        sources(tmp_path)


@pytest.mark.parametrize(("stem", "ending"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_index_that_does_not_fit(tmp_path, stem, ending):
    index = save_sharded(make_tensors(), tmp_path, stem, ending)
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost"] = f"{stem}-00002-of-00002.{ending}"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{stem}-00002-of-00002.{ending} lacks 'model.ghost'"):
        sources(tmp_path)
    (tmp_path / f"{stem}-00002-of-00002.{ending}").unlink()
    with pytest.raises(ValueError, match=f"files that are not there: {stem}-00002-of-00002.{ending}"):
        sources(tmp_path)
    content["weight_map"]["model.ghost"] = "../elsewhere.bin"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="outside its folder"):
        sources(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="no valid weight index"):
        sources(tmp_path)


def test_safetensors_is_preferred_and_load_format_overrules(tmp_path):
    save(make_tensors(0), tmp_path / "model.safetensors")
    save(make_tensors(1), tmp_path / "pytorch_model.bin")
    check(tmp_path, make_tensors(0))
    check(tmp_path, make_tensors(0), "safetensors")
    check(tmp_path, make_tensors(1), "pt")


def test_files_that_are_no_weights_are_left_alone(tmp_path):
    save(make_tensors(), tmp_path / "pytorch_model.bin")
    for name in ("optimizer.bin", "training_args.bin", "adapter_model.safetensors", "consolidated.safetensors"):
        (tmp_path / name).write_bytes(b"not to be opened")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "model.safetensors").write_bytes(b"not to be opened")
    check(tmp_path, make_tensors())


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "optimizer.bin").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"Cannot find any model weights with `.*`.*looked for .*model.safetensors"):
        sources(tmp_path)
    with pytest.raises(RuntimeError, match=r"looked for \*.bin.index.json, pytorch_model.bin"):
        sources(tmp_path, "pt")


def test_wrong_format_for_the_model(tmp_path):
    with pytest.raises(ValueError, match=r"load_format must be 'auto' or one of .*'zip'"):
        sources(tmp_path, "zip")
    with pytest.raises(ValueError, match=r"takes one \.gguf file"):
        sources(tmp_path, "gguf")
    save(make_tensors(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"only a \.gguf file can be one"):
        sources(tmp_path / "model.safetensors")


@pytest.mark.parametrize("load_format", sorted(LOADERS))
def test_every_row_of_the_table_resolves(tmp_path, load_format):
    save(make_tensors(), tmp_path / "model.safetensors")
    save(make_tensors(), tmp_path / "pytorch_model.bin")
    (tmp_path / "a.gguf").write_bytes(b"")
    model = tmp_path / "a.gguf" if load_format == "gguf" else tmp_path
    loader, load = resolve_loader(LoadConfig(str(model), load_format))
    assert type(loader).__module__.startswith("shoal.workers.loading.")
    assert load.load_format == load_format


def test_broken_safetensors_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save(make_tensors(), path)
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:5], b"", b"\xff" * 8 + whole[8:], b"no such thing at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors: .+ corrupt or incomplete"):
            sources(tmp_path)


def test_broken_bin_is_named(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    save(make_tensors(), path)
    whole = path.read_bytes()
    for content in (whole[:-100], b"", b"no such thing at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
            sources(tmp_path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="no state dict: a list without tensors"):
        sources(tmp_path)


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_with_code_is_refused_and_not_run(tmp_path, zipped):
    mark = tmp_path / "mark"
    torch.save(
        {"a": torch.ones(2), "b": Trap(mark)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is refused: .*could run code"):
        sources(tmp_path)
    assert not mark.exists()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        sources(tmp_path)
    assert not mark.exists()


def test_bin_of_the_old_format_and_wrapped_state_dict(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(make_tensors(), path, _use_new_zipfile_serialization=False)
    check(tmp_path, make_tensors())
    torch.save({"state_dict": make_tensors(), "step": 3}, path)
    check(tmp_path, make_tensors())


def test_load_weights_hands_the_sources_to_the_model(tmp_path):
    save(make_tensors(), tmp_path / "model.safetensors")
    seen = {}

    class Model(nn.Module):
        def load_weights(self, weights):
            seen.update((source.name, source.load().clone()) for source in weights)

    load_weights(Model(), LoadConfig(str(tmp_path)))
    assert all(torch.equal(seen[name], tensor) for name, tensor in make_tensors().items())


class Tiny(nn.Module):
    def __init__(self, extra=False, dtype=torch.float32):
        super().__init__()
        if extra:
            self.before = nn.Linear(4, 4, dtype=dtype)
        self.proj = nn.Linear(64, 128, dtype=dtype)
        self.other = nn.Linear(64, 128, dtype=dtype)
        self.norm = nn.LayerNorm(64, dtype=dtype)


def dummy(seed=0, **arguments):
    model = Tiny(**arguments)
    load_weights(model, LoadConfig("nowhere/at-all", "dummy", seed=seed))
    return dict(model.named_parameters())


def test_dummy_values():
    values = dummy()
    assert values["norm.weight"].eq(1).all()
    assert values["proj.weight"].abs().max() <= 0.02
    assert 0.010 < values["proj.weight"].std() < 0.013  # uniform: 0.02 / sqrt(3)
    assert 0 < values["proj.bias"].abs().max() <= 0.001
    assert not torch.equal(values["proj.weight"], values["other.weight"])


def test_dummy_is_a_function_of_seed_and_name():
    values = dummy()
    for name, value in dummy(extra=True).items():
        if name in values:
            assert torch.equal(value, values[name])
    assert not torch.equal(dummy(seed=1)["proj.weight"], values["proj.weight"])
    assert dummy(dtype=torch.bfloat16)["proj.weight"].dtype == torch.bfloat16


def test_dummy_has_no_sources():
    with pytest.raises(ValueError, match="no files to read"):
        list(iterate_weights(LoadConfig("x", "dummy")))


PEAK = """
    import sys, torch
    from shoal.workers.config import LoadConfig
    from shoal.workers.loading import iterate_weights

    def status(key):
        line = next(line for line in open("/proc/self/status") if line.startswith(key + ":"))
        return int(line.split()[1]) // 1024

    torch.set_num_threads(1)
    folder, dim = sys.argv[1], int(sys.argv[2])
    list(iterate_weights(LoadConfig(folder)))  # the imports
    before, shard = status("VmRSS"), []
    for source in iterate_weights(LoadConfig(folder)):
        half = source.shape[dim] // 2
        shard.append(source.narrow(dim, half, half).clone())
    print(status("VmHWM") - before, sum(t.numel() * t.element_size() for t in shard) >> 20)
"""


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_peak_memory_of_loading_a_shard(tmp_path, name, dim):
    """256 MiB in 8 tensors, half of each is kept (128 MiB).

    Measured: the peak of the whole resident set (VmHWM: private memory and mapped pages of the file) over what was
    resident after the imports. It must stay at the shard, one tensor (32 MiB) and what a mapping may hold before it is
    dropped (64 MiB); keeping the whole file mapped would show 256 + 128.
    """
    save({f"t{i}": torch.full((4096, 4096), i, dtype=torch.bfloat16) for i in range(8)}, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), str(tmp_path), str(dim)],
        capture_output=True,
        text=True,
        check=True,
    )
    growth, kept = map(int, done.stdout.split())
    assert kept == 128
    assert growth <= 128 + 32 + 64 + 40
