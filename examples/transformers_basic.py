"""Trains a tiny language model to count with transformers, logged with trainbus."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import trainbus

torch.manual_seed(0)
rows = [(torch.arange(8) + start) % 16 for start in torch.randint(0, 16, (64,))]
data = [{"input_ids": row, "labels": row} for row in rows]
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
config = LlamaConfig(vocab_size=16, num_attention_heads=2, num_key_value_heads=2, **sizes)
args = TrainingArguments(
    output_dir="counting",
    num_train_epochs=3,
    learning_rate=0.01,
    logging_steps=4,
    eval_strategy="epoch",
    save_strategy="epoch",
    metric_for_best_model="loss",
    use_cpu=True,
)
trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=data[:48], eval_dataset=data[48:])

with trainbus.load("config/local.yaml") as bus:
    bus.attach(trainer)
    trainer.train()
