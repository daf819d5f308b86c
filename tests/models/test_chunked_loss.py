"""The head in chunks gives the losses and gradients of the head at once."""

import torch


def test_chunks_change_nothing(golden, monkeypatch):
    import mindspeed_mm as mm

    vlm = mm.load(golden / "models" / "llava_original", device="cpu")
    from mindspeed_mm.models import loss

    decoder = vlm.model.text_decoder
    hidden = torch.randn(9, 2, 96)
    labels = torch.randint(0, 900, (2, 9))
    labels[0, :4] = -100

    def run():
        leaf = hidden.clone().requires_grad_()
        weight = decoder.output_layer.weight.requires_grad_()
        losses = loss.token_losses(decoder, leaf, labels)
        return [losses.detach(), *torch.autograd.grad((losses * torch.arange(14)).sum(), (leaf, weight))]

    assert loss.CHUNK > 14
    at_once = run()
    monkeypatch.setattr(loss, "CHUNK", 5)
    for found, wanted in zip(run(), at_once, strict=True):
        torch.testing.assert_close(found, wanted)
