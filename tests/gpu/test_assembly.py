"""What is read off assembly, on small texts whose facts were counted by hand."""

import pytest

from nsa.gpu.assembly import amdgcn_facts, cubin_facts, ptx_facts

PTX = """
.visible .entry f(
	.param .u64 .ptr .global .align 1 f_param_0,
	.param .u64 .ptr .global .align 1 f_param_1,
	.param .u32 f_param_2,
	.param .u64 .ptr .global .align 1 f_param_3
)
{
	ld.param.b64 	%rd1, [f_param_0];
	ld.param.b64 	%rd2, [f_param_1];
	ld.param.b32 	%r1, [f_param_2];
	ld.param.b64 	%rd3, [f_param_3];
	ld.param.s32 	%rd14, [f_param_2];
	add.s64 	%rd2, %rd2, %rd14;
	mad.wide.s32 	%rd4, %r1, 2, %rd1;
	add.s64 	%rd5, %rd4, 256;
	@%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd4 + 0 ];
	@!%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd5 + 16 ];
	ld.global.b64 { %rd6 }, [ %rd2 + 8 ];
	add.s64 	%rd7, %rd3, %rd6;
	ld.global.L1::evict_last.v2.b64 {%rd8, %rd9}, [%rd7];
	ld.global.b16 %rs1, [%rd7+2];
	mov.b64 	%rd10, %rd11;
	cp.async.cg.shared.global [ %r6 + 0 ], [ %rd10 + 0 ], 0x10, %r7;
	cp.async.ca.shared.global [ %r6 + 0 ], [ %rd4 + 0 ], 8, 8;
	cp.async.commit_group;
	cp.async.wait_group 1;
	add.s64 	%rd11, %rd10, 64;
	add.s64 	%rd11, %rd1, 0;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
	wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd12, %rd13, p, 1, 1;
	wgmma.fence.sync.aligned;
	wgmma.wait_group.sync.aligned 1;
	tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64 [%r1];
	tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd12, %rd13, %r3, %p1;
	st.global.v4.b32 [ %rd4 + 0 ], { %r2, %r3, %r4, %r5 };
}
"""


def test_ptx():
    assert ptx_facts(PTX, ["x", "starts", "n", "y"]) == {
        # two vectors of 16 bytes, a copy of 16 through a pointer that a loop hands round, a copy of 8
        "loads": {"starts": {8: 1}, "x": {8: 1, 16: 3}, "y": {2: 1, 16: 1}},
        "cp_async": 2,
        "mma": 1,
        "wgmma": 1,
        "tcgen05": 1,
    }


@pytest.mark.parametrize("made", ["add.s64 	%rd4, %rd1, %rd2;", "mov.b64 	%rd4, 0;"])
def test_address_of_two_pointers_or_none_is_an_error(made):
    ptx = PTX.replace("mad.wide.s32 	%rd4, %r1, 2, %rd1;", made)
    with pytest.raises(ValueError, match="expected an address made of one pointer, got %rd4"):
        ptx_facts(ptx, ["x", "starts", "n", "y"])


def test_cubin():
    resources = """
Resource usage:
 Common:
  GLOBAL:0
 Function grad_weight_repair_kernel:
  REG:255 STACK:24 SHARED:1024 LOCAL:0 CONSTANT[0]:592 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert cubin_facts(resources) == {"registers": 255, "stack": 24}


AMDGCN = """
f:
	s_load_dwordx4 s[12:15], s[0:1], 0x28
	global_load_dwordx4 v[4:7], v26, s[2:3]
	global_load_dwordx2 v[4:5], v26, s[2:3] offset:16
	buffer_load_dwordx4 v[50:53], v68, s[20:23], 0 offen
	buffer_load_ushort v63, v61, s[4:7], 0 offen offset:4
	buffer_load_short_d16_hi v63, v61, s[4:7], 0 offen offset:6
	buffer_load_ubyte v63, v61, s[4:7], 0 offen offset:6
	buffer_load_dword v27, s[20:23], 0 offen lds
	flat_load_dword v1, v[2:3]
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
	v_smfmac_f32_16x16x32_bf16 a[0:3], v[0:1], v[2:5], v6
	global_store_dwordx4 v1, v[2:5], s[2:3]
	.agpr_count:     8
    .group_segment_fixed_size: 0
    .private_segment_fixed_size: 12
    .sgpr_count:     38
    .sgpr_spill_count: 1
    .vgpr_count:     100
    .vgpr_spill_count: 3
"""


def test_amdgcn():
    assert amdgcn_facts(AMDGCN) == {
        "registers": 100,
        "spilled_registers": 3,
        "stack": 12,
        "loads": {"all": {1: 1, 2: 2, 4: 2, 8: 1, 16: 2}},
        "loads_to_shared": 1,
        "mfma": 2,
    }
