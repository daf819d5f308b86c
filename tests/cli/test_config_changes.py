"""`train` with `_base_` and `--cfg-options`: the checkpoint holds what counted, and a relaunch goes on with it."""

import json

from tests.cli.test_train_checks import train  # noqa: F401  (the fixture)


def test_train_takes_both_and_the_checkpoint_holds_what_counted(train, golden):  # noqa: F811
    from mindspeed_mm.cli.main import main
    from mindspeed_mm.inference.locate import locate

    names = ("text_decoder", "vision_encoder", "vision_projector")
    train.model["image_encoder"]["vision_projector"]["freeze"] = True  # nothing trains, were the option not to count
    (train.folder / "base.json").write_text(json.dumps(train.data()))
    train.data = lambda: {"_base_": "base.json"}
    options = ("--cfg-options", "model.image_encoder.vision_projector.freeze=false")
    code, result, error = train("--train-iters", "1", *options)
    assert code == 0, error
    spec = locate(train.save).spec
    assert [spec.part(name).freeze for name in names] == [True, True, False]
    code, result, error = train("--train-iters", "2", *options)
    assert code == 0 and result["iteration"] == 2, error
    code, _, error = train("--train-iters", "2")
    assert code != 0 and "nothing to train" in error
    files = ["--mm-model", str(train.folder / "m.json"), "--mm-data", str(train.folder / "d.json")]
    assert main(["check-data", *files, "--cfg-options", "data.dataset_param.template_name=v1", "--workers", "1"]) == 0
    assert main(["plan", *files, "--cfg-options", "model.text_decoder.num_layer=1", "--memory", "1GB"]) != 0
    assert 'text_decoder.num_layer: unknown key; did you mean "num_layers"' in train.capsys.readouterr().err
