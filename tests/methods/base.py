"""What every method must do, as classes of tests to derive from."""

import io

import pytest
import torch

from wsss import methods
from wsss.backbones.vit import MultiTokenViT

CLASSES = 3
SIDE = 64  # pixels, 8 x 8 patches


class ClassifierTester:
    """Losses and maps of a method, on a small network without pretrained weights, whose grid has 8 x 8 cells.

    A test class derives from it, sets `name` (of the method) and `settings` (all terms on at step 0), and makes its
    `backbone`.
    """

    name: str
    settings: dict
    terms: set[str]  # the names of all terms
    always: set[str]  # those that no weight switches off

    def backbone(self, method):
        raise NotImplementedError

    def make(self, **settings):
        torch.manual_seed(0)
        method = methods.find(self.name)
        backbone = self.backbone(method)
        return method(method.Config(**self.settings | settings), CLASSES, backbone)

    @pytest.fixture(autouse=True)
    def one_thread(self):
        """The network is so small that a second thread only waits, for ages on a busy machine."""
        torch.set_num_threads(1)

    @pytest.fixture
    def method(self):
        return self.make()

    @pytest.fixture
    def batch(self):
        """Two images, each with a bright square of one colour for each of its classes."""
        torch.manual_seed(1)
        images = 0.3 * torch.randn(2, 3, SIDE, SIDE)
        images[0, 0, 8:40, 8:40] += 2
        images[1, 1, 24:56, :32] += 2
        images[1, 2, 24:56, 32:] += 2
        return {"image": images, "label": torch.tensor([[1.0, 0, 0], [0, 1, 1]])}

    def test_all_terms_are_scalars_and_finite(self, method, batch):
        terms = method.losses(batch, 0)
        assert set(terms) == self.terms
        for name, value in terms.items():
            assert value.shape == () and value.isfinite() and value.requires_grad, name

    def test_term_of_weight_zero_is_not_computed(self, batch):
        off = {f"weight_{name}": 0.0 for name in self.terms - self.always}
        assert set(self.make(**off).losses(batch, 0)) == self.always

    def test_maps_have_one_channel_per_class(self, method, batch):
        maps = method.eval().maps(batch["image"])
        assert maps.pop("class_logits").shape == (2, CLASSES, 1, 1)
        assert set(maps) == set(method.map_names) - {"fused"}
        for name, value in maps.items():
            assert value.shape == (2, CLASSES, 8, 8), name

    def test_maps_follow_the_size_of_the_image(self, method, batch):
        wide = torch.nn.functional.interpolate(batch["image"], size=(48, 80))
        assert {name: maps.shape for name, maps in method.eval().maps(wide).items() if name != "class_logits"} == {
            name: (2, CLASSES, 6, 10) for name in method.map_names if name != "fused"
        }

    def test_every_parameter_gets_a_gradient(self, method, batch):
        sum(method.losses(batch, 0).values()).backward()
        without = [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == []

    def test_loss_falls_on_two_images(self, method, batch):
        optimiser = torch.optim.AdamW(method.parameters(), lr=1e-3)
        history = []
        for _ in range(12):
            torch.manual_seed(2)
            loss = sum(method.losses(batch, 0).values())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            history.append(loss.item())
        assert min(history[-3:]) < 0.9 * history[0]

    def outcome(self, method, images):
        return method.maps(images)

    def test_evaluation_is_deterministic_and_survives_saving(self, method, batch):
        file = io.BytesIO()
        torch.save(method.state_dict(), file)
        file.seek(0)
        copy = self.make()
        for parameter in copy.parameters():
            torch.nn.init.normal_(parameter)
        copy.load_state_dict(torch.load(file))
        with torch.no_grad():
            outcomes = [self.outcome(m.eval(), batch["image"]) for m in (method, method, copy)]
        for name, value in outcomes[0].items():
            assert all(torch.equal(value, other[name]) for other in outcomes[1:]), name

    def test_image_without_labels_is_no_error(self, method, batch):
        for labels in (torch.zeros(2, CLASSES), torch.tensor([[0.0, 0, 0], [1, 0, 0]])):
            terms = method.losses(batch | {"label": labels}, 0)
            sum(terms.values()).backward()
            assert all(value.isfinite() for value in terms.values())
            assert all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


class MethodTester(ClassifierTester):
    """The three faces of a method of one stage, on a vision transformer: it makes its own seeds, and has a decoder."""

    def backbone(self, method):
        return MultiTokenViT(
            class_tokens=method.class_tokens(CLASSES),
            registers=2,
            image_size=SIDE,
            token_init="noise",
            pretrained=False,
        )

    def outcome(self, method, images):
        return method.maps(images) | {"decoder": method.segment(images)}

    def test_terms_start_at_their_step(self, batch):
        late = {key: 5 for key in self.settings if key.endswith("_start")}
        method = self.make(**late)
        assert set(method.losses(batch, 4)) < set(method.losses(batch, 5)) == self.terms

    def test_segment_has_a_background_channel_or_there_is_no_decoder(self, method, batch):
        assert method.eval().segment(batch["image"]).shape == (2, CLASSES + 1, 8, 8)
        assert self.make(weight_seg=0.0).segment(batch["image"]) is None

    def test_supervision_has_no_gradient_and_one_scale_needs_one_pass(self, method, batch):
        """With one scale and no mirror the maps that supervise are those of the training pass."""
        passes = []
        method.backbone.register_forward_hook(lambda *_: passes.append(1))
        tokens = method.encode(batch["image"])
        maps = method.token_maps(tokens)
        seeds = method.seeds(batch["image"], maps)
        assert len(passes) == 1
        for seed in seeds.values():
            assert not seed.requires_grad
            assert seed.shape == (2, CLASSES, 8, 8)
            assert 0 <= seed.min() and seed.max() < 1
        method.losses(batch, 0)
        assert len(passes) == 2

    def test_two_scales_with_mirror_images_take_two_passes_more(self, batch):
        method = self.make(cam_scales=[1.0, 0.5], cam_flip=True)
        sizes = []
        method.backbone.register_forward_hook(lambda _, inputs, __: sizes.append(tuple(inputs[0].shape)))
        method.losses(batch, 0)
        assert sizes == [(2, 3, SIDE, SIDE), (4, 3, SIDE, SIDE), (4, 3, SIDE // 2, SIDE // 2)]

    def test_half_precision_backbone_gives_about_the_same_losses(self, method, batch):
        torch.manual_seed(2)
        exact = method.losses(batch, 0)
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            half = method.losses(batch, 0)
        for name in ("cls", "aux"):
            torch.testing.assert_close(half[name], exact[name], rtol=0.02, atol=0.02)
        assert all(value.dtype == torch.float32 and value.isfinite() for value in half.values())

    def test_unknown_activation_is_an_error(self):
        with pytest.raises(ValueError, match="cam_activation 'sigmoid' is unknown.*relu, minmax"):
            self.make(cam_activation="sigmoid")
