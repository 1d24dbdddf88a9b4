"""FID's features are torch-fidelity's, whatever the batch; its weights are read without running a pickle."""

import hashlib
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from stages import baseline, evaluate, report
from stages.lib.data.pairs import read_captions
from stages.lib.diffusion.schedule import training_scheduler
from stages.lib.evaluation.distances import extrapolated_frechet, frechet_distance
from stages.lib.evaluation.measuring import bench
from stages.lib.evaluation.measuring import inception_features as module
from stages.lib.evaluation.measuring.clip_features import load_clip
from stages.lib.evaluation.measuring.inception_features import (
    BATCH_SIZE,
    Inception,
    inception_features,
    load_inception,
)
from stages.lib.evaluation.measuring.measure import measure_data, measure_unet
from stages.lib.evaluation.measuring.measurements import read_measurements, write_measurements
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import read_params
from tests.clips import bundled_clip, value_of
from tests.conftest import (
    REPOSITORY,
    changed,
    content_fingerprint,
    draw_image,
    reseal,
    run_encoders,
    write_params,
)
from tests.unit.evaluation.test_report import measured

pytestmark = pytest.mark.skipif(
    module.importlib.util.find_spec("torch_fidelity") is None, reason=f"needs `{module.INSTALL}`"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file like torch-fidelity's, of random weights."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    fidelity = module._extractor_module()
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *arguments, **options: None)
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        model = fidelity.FeatureExtractorInceptionV3("inception", ["2048"])
        for layer in model.modules():  # as it is drawn, features are 1e-8, and all distances are alike
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights) -> Inception:
    return load_inception(weights)


def test_features_are_the_networks_own_and_no_matter_of_neighbours(inception):
    pictures = [draw_image(number, (40, 40)) for number in range(BATCH_SIZE + 2)]
    found = inception_features(inception, pictures)
    assert found.shape == (BATCH_SIZE + 2, 2048) and found.dtype == torch.float32
    for row in (0, BATCH_SIZE + 1):
        pixels = torch.from_numpy(np.asarray(pictures[row].convert("RGB")).copy()).permute(2, 0, 1)[None]
        (expected,) = inception.model(pixels)
        torch.testing.assert_close(found[row], expected[0], rtol=1e-4, atol=1e-5)
    for row in (5, BATCH_SIZE + 1):
        assert torch.equal(inception_features(inception, [pictures[row]]), found[row : row + 1])
    assert not torch.allclose(found[0], found[1])
    assert inception_features(inception, []).shape == (0, 2048)


def test_features_of_held_out_images_are_kept_with_the_base(encoded, inception, tmp_path):
    clip = load_clip(bundled_clip(tmp_path / "clip"))
    samples = read_captions(Path("data/pairs/captions.parquet"))
    reference = measure_data(clip, inception, samples, Path("data/pairs/images"), 48)
    assert reference.held_out_inception.shape == (len(reference.held_out), 2048)
    base = measured(torch.ones(6, 4), torch.ones(6, 8), torch.ones(6, 8))
    write_measurements(tmp_path / "written.safetensors", base, reference)
    _, read = read_measurements(tmp_path / "written.safetensors", "baseline")
    assert torch.equal(read.held_out_inception, reference.held_out_inception)
    without = measure_data(clip, None, samples, Path("data/pairs/images"), 48)
    assert without.held_out_inception is None


def test_fid_is_of_held_out_captions_pictures_by_one_network(encoded, inception, weights, tmp_path):
    pictures = []
    for number in range(4):
        pictures.append(tmp_path / f"{number}.png")
        draw_image(number, (32, 32)).save(pictures[-1])
    scheduler = training_scheduler({"beta_schedule": "scaled_linear", "beta_start": 1e-3, "beta_end": 1e-2})
    losses = measured(torch.ones(6, 4)).losses
    clip = load_clip(bundled_clip(tmp_path / "clip"))
    found = measure_unet(losses, scheduler, clip, inception, pictures, ["red", "blue"])
    assert len(found.picture_features) == 4
    expected = inception_features(inception, [Image.open(path) for path in pictures[:2]])
    assert torch.equal(found.inception_features, expected)
    assert found.inception_fingerprint == hashlib.sha256(weights.read_bytes()).hexdigest()
    write_measurements(tmp_path / "base.safetensors", found, None)
    base, _ = read_measurements(tmp_path / "base.safetensors", "baseline")
    evaluate.check_same_inception(base, inception)
    without = measure_unet(losses, scheduler, clip, None, pictures, ["red", "blue"])
    evaluate.check_same_inception(without, None)
    another = changed(inception, fingerprint="0" * 64)
    for measurements, given in ((base, None), (base, another), (without, inception)):
        with pytest.raises(StageError, match=r"not the one that data/baseline was measured with"):
            evaluate.check_same_inception(measurements, given)


def test_an_evaluation_has_fid_and_stops_at_other_weights_before_it_deletes(encoded, weights, monkeypatch):
    given = shutil.copy(weights, encoded / "weights.pth")
    params = write_params(
        prepare={"validation_fraction": 0.5},
        evaluate={"prompts": ["red cat"], "seeds": [0], "inception_weights": str(given)},
    )
    bundled_clip(encoded / "data/base/clip")
    run_encoders(params)
    unet = UNet2DConditionModel.from_pretrained("data/base/unet")
    unet.conv_out.weight.data *= 1.5
    unet.save_pretrained("data/unet")
    reseal()
    baseline.main(params)
    evaluate.main(params)
    report.main(params)
    numbers = json.loads(Path("data/evaluation/metrics.json").read_text())
    assert len(list(Path("data/evaluation/metric_samples").iterdir())) >= 5
    features = {
        folder: inception_features(load_inception(given), map(Image.open, sorted(Path(folder).iterdir())))
        for folder in ("data/baseline/metric_samples", "data/evaluation/metric_samples")
    }
    _, reference = read_measurements(Path("data/baseline/measurements.safetensors"), "baseline")
    captions = [
        sample.captions[0]
        for sample in read_captions(Path("data/pairs/captions.parquet"))
        if sample.split == "validation"
    ]
    labels = [captions.index(caption) for caption in captions]
    for unet_name, generated in zip(("base", "tuned"), features.values(), strict=True):
        fid = extrapolated_frechet(generated, reference.held_out_inception, (labels, labels)).item()
        plain = value_of(frechet_distance, generated, reference.held_out_inception)
        assert plain > 1e-3 and fid != pytest.approx(plain, rel=0.01)
        assert numbers[f"{unet_name}_fid"] == pytest.approx(fid, rel=1e-6, abs=0)
        assert numbers[f"{unet_name}_fid_low"] is numbers[f"{unet_name}_fid_high"] is None
    assert numbers["base_fid"] != numbers["tuned_fid"]

    before = content_fingerprint(Path("data"))
    monkeypatch.setattr(bench, "load_renderer", lambda *arguments: pytest.fail("rendered"))
    torch.save(torch.load(given), given, _use_new_zipfile_serialization=False)
    with pytest.raises(StageError, match=r"not the one that data/baseline was measured with"):
        evaluate.main(params)
    assert content_fingerprint(Path("data")) == before


def test_weights_are_loaded_only_where_fid_is_asked_for(weights):
    options = read_params(REPOSITORY / "params.yaml").evaluate
    asked = changed(options, inception_weights=str(weights))
    clip = object()
    assert bench._inception_for_fid(options, clip) is None
    assert bench._inception_for_fid(options, None) is None
    assert isinstance(bench._inception_for_fid(asked, clip), Inception)
    with pytest.raises(StageError, match=r"data/base has no clip/; set fetch_base.clip_source"):
        bench._inception_for_fid(asked, None)


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"", "expected weights-inception"),
        (b"<html>not found</html>", "expected weights-inception"),
        ({"conv.weight": torch.zeros(1)}, "expected weights-inception"),
        ([1, 2], "expected weights-inception"),
        (b"\x80\x02\x8a\x0a", "expected weights-inception"),
    ],
)
def test_another_file_is_refused(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(StageError, match=r"weights.pth \(evaluate.inception_weights\): .*" + message):
        load_inception(path)


def test_a_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (("plain.pth", pickle.dumps(Malicious())), ("torch.pth", saved(Malicious()))):
        Path(name).write_bytes(content)
        with pytest.raises(StageError, match="expected weights-inception"):
            load_inception(Path(name))
    assert not Path("executed").exists()


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_without_torch_fidelity_the_command_is_named(monkeypatch, weights):
    monkeypatch.delitem(module.sys.modules, "torch_fidelity", raising=False)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StageError, match=r"FID needs torch-fidelity; run `pip install --no-deps torch-fid"):
        load_inception(weights)


def test_pictures_are_converted_to_rgb(inception):
    grey = draw_image(3, (24, 24)).convert("L")
    assert torch.equal(
        inception_features(inception, [grey]), inception_features(inception, [Image.merge("RGB", [grey] * 3)])
    )


def test_weights_that_are_not_what_their_name_says_are_refused(tmp_path, weights):
    content = bytearray(Path(weights).read_bytes())
    named = tmp_path / f"weights-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    named.write_bytes(content)
    load_inception(named)
    content[len(content) // 2] ^= 1
    named.write_bytes(content)
    with pytest.raises(StageError, match=r"SHA-256 begins with [0-9a-f]{8}, as its name says, got"):
        load_inception(named)
