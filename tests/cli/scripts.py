"""Training scripts of other people, as text: none of them knows of robust_train."""

PLAIN = """
import torch
from {package} import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

def loader(shuffle=True):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(240) % 3
    x = 0.2 * torch.rand(240, 1, 8, 8, generator=g)
    x[torch.arange(240), 0, y] += 0.7
    return DataLoader(TensorDataset(x, y), 16, shuffle=shuffle)

if __name__ == "__main__":
    trainer = Trainer(fast_dev_run=True, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Net(), loader(), loader(shuffle=False))
    print("trained with", *(type(c).__name__ for c in trainer.callbacks))
"""

LIGHTNING_CLI = """
import runpy
from pathlib import Path
from {package} import LightningDataModule
from {package}.cli import LightningCLI
plain = runpy.run_path(str(Path(__file__).parent / "plain.py"))
Net, loader = plain["Net"], plain["loader"]

class Data(LightningDataModule):
    def train_dataloader(self):
        return loader()
    def val_dataloader(self):
        return loader(shuffle=False)

made = LightningCLI(Net, Data, save_config_callback=None, args=[
    "fit", "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    "--seed_everything=0",
])
print("trained with", *(type(c).__name__ for c in made.trainer.callbacks))
"""

# in the manner of a widely used template: callbacks are a dict of targets
HYDRA_APP = """
import runpy
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig
from pytorch_lightning import Trainer
plain = runpy.run_path(str(Path(__file__).parent / "plain.py"))

@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg):
    callbacks = [hydra.utils.instantiate(c) for c in cfg.callbacks.values() if c is not None]
    trainer = Trainer(callbacks=callbacks, **cfg.trainer)
    trainer.fit(plain["Net"](), plain["loader"](), plain["loader"](shuffle=False))
    assert HydraConfig.get().job.name == "app"
    print("trained with", *(type(c).__name__ for c in trainer.callbacks))

main()
"""

HYDRA_CONFIG = """
defaults: [_self_]
callbacks:
  timer: {_target_: pytorch_lightning.callbacks.Timer}
trainer: {fast_dev_run: true, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
task_name: theirs
hydra: {job: {name: app}, run: {dir: out}}
"""
