"""An adapter on a base that DeepSpeed ZeRO-3 has partitioned, compared with a whole base."""

import pytest
import torch
from models import llama
from processes import run_ranks
from sharded import (
    STEPS,
    WORLD,
    batches,
    config,
    findings,
    gap,
    halves,
    join,
    leave,
    logits,
    products,
    sgd,
    train,
)

from lora_init import LoraModel, get_peft_model

pytest.importorskip("deepspeed")
SETTINGS = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def work(rank, folder):
    import deepspeed  # in the process: it reads the environment

    join(rank, folder)
    deepspeed.ops.__compatible_ops__.clear()  # it would compile an operator
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)

    def partitioned():
        """As a model that is built under zero.Init."""
        base = llama()
        deepspeed.zero.Init(module=base, config_dict_or_path=SETTINGS)
        return base

    def engine_of(model):
        return deepspeed.initialize(model=model, optimizer=sgd(model), config=SETTINGS)[0]

    data = halves(rank)
    model = get_peft_model(partitioned(), config(init_lora_weights="pissa"))
    found = {
        "start": products(model),
        "report": [row["error"] for row in model.init_report().to_dict()["layers"]],
        "local": sum(each.numel() for each in model.base_model.model.embed_tokens.parameters()),
    }
    engine = engine_of(model)
    engine.train()
    for batch in data[:STEPS]:
        engine.backward(engine(**batch).loss)
        engine.step()
    engine.eval()
    found["trained"], after = products(model), logits(engine, data)
    engine.save_checkpoint(f"{folder}/checkpoint")
    model.save_pretrained(f"{folder}/adapter")
    other = engine_of(get_peft_model(partitioned(), config(init_lora_weights="pissa"), seed=1))
    other.load_checkpoint(f"{folder}/checkpoint")
    other.eval()
    found["resumed"] = gap({0: logits(other, data)}, {0: after})
    other = LoraModel.from_pretrained(partitioned(), f"{folder}/adapter")
    found["from file"] = products(other)
    for name, refused in (("unload", model.unload), ("merge", model.merge_and_unload)):
        with pytest.raises(RuntimeError, match="partitioned by DeepSpeed ZeRO-3"):
            refused()
        found[name] = gap({0: logits(engine, data)}, {0: after})
    plain = engine_of(llama())
    for each in (plain, plain.module):
        with pytest.raises(TypeError, match="deepspeed.initialize has already built its optimizer"):
            get_peft_model(each, config(init_lora_weights="pissa"))
    leave(found, rank, folder)


@pytest.mark.exhaustive
def test_two_ranks_are_one_process(tmp_path):
    run_ranks(work, tmp_path, WORLD)
    model = get_peft_model(llama(), config(init_lora_weights="pissa"))
    errors = [row["error"] for row in model.init_report().to_dict()["layers"]]
    first, trained = products(model), products(train(model, batches()))
    for one in findings(tmp_path):
        assert one["local"] == 0
        assert gap(one["start"], first) <= 1e-6
        assert one["report"] == pytest.approx(errors, rel=1e-5)
        assert gap(one["trained"], trained) <= 1e-6
        assert gap(one["from file"], one["trained"]) <= 1e-6
        for way in ("resumed", "unload", "merge"):
            assert one[way] <= 1e-6, way
    fresh = LoraModel.from_pretrained(llama(), tmp_path / "adapter")
    expected = logits(model, batches())
    torch.testing.assert_close(logits(fresh.eval(), batches()), expected, atol=1e-4, rtol=1e-4)
