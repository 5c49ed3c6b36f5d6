import pytest, torch
from safetensors.torch import load_file
from tests.support import train_network
from tests.conftest import *

KINDS={
 "dylora":("networks.dylora","--network_args","unit=2","module_dropout=0.2"),
 "loha":("networks.loha","--network_args","rank_dropout=0.2","conv_dim=2","use_tucker=1"),
 "lokr":("networks.lokr","--network_args","rank_dropout=0.2","conv_dim=2","factor=4"),
 "oft":("networks.oft","--network_alpha=0.1"),
 "ly_loha":("lycoris.kohya","--network_args","algo=loha"),
 "ly_lokr":("lycoris.kohya","--network_args","algo=lokr"),
}
@pytest.mark.parametrize("kind",KINDS)
def test_resume(kind, tiny_sd1, photo_folders, tmp_path):
    module,*rest=KINDS[kind]
    def run(out,*argv):
        train_network("--pretrained_model_name_or_path",str(tiny_sd1),"--train_data_dir",str(photo_folders),"--output_dir",str(tmp_path/out),"--output_name=n","--network_module",module,"--network_dim=4","--learning_rate=1e-2","--resolution=64","--train_batch_size=1","--seed=5","--save_precision=float","--min_bucket_reso=64","--enable_bucket",*argv,*rest)
        return load_file(tmp_path/out/"n.safetensors")
    a=run("a","--max_train_steps=4","--save_state","--save_every_n_steps=2")
    states=sorted((tmp_path/"a").glob("*state"))
    print(states)
    b=run("b","--max_train_steps=4","--resume",str([s for s in states if "step00000002" in s.name][0]))
    assert a.keys()==b.keys()
    bad=[k for k in a if not torch.equal(a[k],b[k])]
    assert not bad,(len(bad),len(a),bad[:3])
