"""The baseline."""

import pytest
import torch
from base import MethodTester

from wsss.experiments import Experiment
from wsss.methods import find
from wsss.methods.cam import Cam, CamConfig

SMALL = {
    "cam_scales": [1.0], "cam_flip": False, "cam_activation": "minmax", "seg_start": 0, "ptc_start": 0,
    "weight_aux": 1.0, "weight_ptc": 0.3, "weight_seg": 1.0, "weight_energy": 1.0,
    "par_dilations": [1, 2], "par_iterations": 2, "decoder_width": 16, "decoder_dilation": 2, "energy_scale": 0.25,
}  # fmt: skip


class TestCam(MethodTester):
    name = "cam"
    settings = SMALL
    terms = {"cls", "aux", "ptc", "seg", "energy"}
    always = {"cls"}

    def test_class_logits_are_the_maxima_of_the_map(self, method, batch):
        maps = method.maps(batch["image"])
        assert torch.equal(maps["class_logits"].flatten(1), maps["cam"].flatten(2).max(-1).values)

    def test_class_logits_of_pooled_features_see_each_channel_at_its_own_place(self, batch):
        method = self.make(pooling="features").eval()
        tokens = method.encode(batch["image"])
        expected = tokens.patches.max(1).values @ method.classifier.weight.T
        torch.testing.assert_close(method.maps(batch["image"])["class_logits"].flatten(1), expected)
        auxiliary = tokens.taps[-3].max(1).values @ method.aux_classifier.weight.T
        terms = method.classification_losses(tokens, method.token_maps(tokens), batch["label"])
        expected = torch.nn.functional.multilabel_soft_margin_loss(auxiliary, batch["label"])
        torch.testing.assert_close(terms["aux"], method.config.weight_aux * expected)

    def test_unknown_pooling_is_an_error(self):
        with pytest.raises(ValueError, match="pooling 'mean' is unknown; choose one of scores, features"):
            self.make(pooling="mean")

    def test_maps_are_class_weights_times_tokens(self, method, batch):
        tokens = method.encode(batch["image"])
        cam = torch.einsum("bld,cd->bcl", tokens.patches, method.classifier.weight)
        aux = torch.einsum("bld,cd->bcl", tokens.taps[-3], method.aux_classifier.weight)
        maps = method.maps(batch["image"])
        torch.testing.assert_close(maps["cam"].flatten(2), cam)
        torch.testing.assert_close(maps["cam_aux"].flatten(2), aux)

    def test_relu_removes_negative_scores_before_normalising(self, batch):
        maps = {"cam": torch.tensor([[[[-3.0, 1], [2, 0]]]]), "cam_aux": torch.zeros(1, 1, 2, 2)}
        image = batch["image"][:1, :, :2, :2]
        cut, kept = (self.make(cam_activation=how).seeds(image, maps)["cam"].flatten() for how in ("relu", "minmax"))
        torch.testing.assert_close(cut, torch.tensor([0, 0.5, 1, 0]), rtol=0, atol=1e-4)
        torch.testing.assert_close(kept, torch.tensor([0, 0.8, 1, 0.6]), rtol=0, atol=1e-4)

    def test_decoder_learns_its_pseudo_label(self, method, batch):
        optimiser = torch.optim.AdamW(method.decoder.parameters(), lr=5e-3)
        history = []
        for _ in range(10):
            seg = method.losses(batch, 0)["seg"]
            optimiser.zero_grad()
            seg.backward()
            optimiser.step()
            history.append(seg.item())
        assert history[-1] < 0.6 * history[0]


def test_names_find_their_class():
    assert find("cam") is Cam
    with pytest.raises(ValueError, match="method 'cams' is unknown; choose one of cam, more"):
        find("cams")


def test_defaults_are_the_numbers_of_the_recipe_for_voc():
    assert Experiment("cam", "released", "voc2012", seed=0).config(CamConfig) == CamConfig(pooling="features")


@pytest.mark.parametrize("dataset", ["embedded", "voc2012-cpu", "coco2014"])
def test_baseline_and_more_share_their_common_numbers(dataset):
    """Only what MoRe's variants are about may differ, or a comparison would compare something else."""
    recipes = [Experiment(name, "released", dataset, seed=0).recipe() for name in ("cam", "more")]
    different = {key for key in recipes[0] if recipes[0][key] != recipes[1][key]}
    own_maps = {"threshold_lam", "threshold_fused"}  # of maps that the baseline does not have
    assert different <= {"registers", "token_init", "pos_resize"} | own_maps
