import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TQDM_MININTERVAL", "10")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
