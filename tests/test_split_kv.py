"""The Triton kernel, where there is no GPU: it compiles for one. What it computes is tested in test_gpu.py."""

import pytest

triton = pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA only")

TYPES = dict.fromkeys("qkv", "*bf16") | dict(out="*bf16", valid="*i64", slots="i32", scale="fp32")
TYPES |= dict.fromkeys(("logits", "sums", "tops", "parts"), "*fp32")


@pytest.mark.parametrize(("kv_heads", "group", "dim"), [(8, 4, 128), (32, 1, 128), (3, 3, 64)])
def test_it_compiles_for_an_h100(kv_heads, group, dim):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmark import split_kv

    sizes = dict(kv_heads=kv_heads, group=group, padded=16, dim=dim, block=split_kv.BLOCK)
    for kernel, own in ((split_kv.parts_kernel, sizes), (split_kv.join_kernel, sizes | dict(splits=6, width=8))):
        signature = {name: "constexpr" if name in own else TYPES[name] for name in kernel.arg_names}
        constants = {(kernel.arg_names.index(name),): value for name, value in own.items()}
        made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
        assert made.asm["cubin"] and "local" not in made.asm["ptx"]  # no register is spilled
