//! Warp-wide instructions, matrix products, calls and jumps.

use crate::common;
use crate::common::{clean, kernel, run_module};
use half::{bf16, f16};
use ptxvm::Module;

/// Runs a body of one warp that leaves a word of each lane in %r4, and returns those.
fn words(body: &str) -> Vec<u32> {
    let body = format!("{body}\nmad.wide.u32 %rd3, %r1, 4, %rd2;\nst.global.u32 [%rd3], %r4;");
    let mut ran = run_module(&kernel(&body), 1, 32, 7);
    assert!(ran.vm.findings().is_empty(), "{}{body}", ran.list());
    let q = ran.q;
    ran.u32s(q, 32)
}

#[test]
fn shuffles() {
    for width in [32u32, 8] {
        let c = (32 - width) << 8;
        for by in [0u32, 1, 5, 9] {
            let run = |mode: &str, clamp: u32| {
                words(&format!("shfl.sync.{mode}.b32 %r4|%p1, %r1, {by}, {}, -1;", c | clamp))
            };
            let lanes = || (0..32u32).map(|l| (l, l % width, l - l % width));
            let up: Vec<u32> = lanes().map(|(l, i, _)| if i >= by { l - by } else { l }).collect();
            assert_eq!(run("up", 0), up);
            let down: Vec<u32> =
                lanes().map(|(l, i, _)| if i + by < width { l + by } else { l }).collect();
            assert_eq!(run("down", 31), down);
            let idx: Vec<u32> = lanes().map(|(_, _, base)| base + by % width).collect();
            assert_eq!(run("idx", 31), idx);
            let bfly: Vec<u32> = lanes()
                .map(|(l, i, base)| if (i ^ by) < width { base + (i ^ by) } else { l })
                .collect();
            // Across the segment's end the lane keeps its own, except below it.
            if by < width {
                assert_eq!(run("bfly", 31), bfly);
            }
        }
    }
}

#[test]
fn votes_and_matches() {
    let all = |x: u32| vec![x; 32];
    let test = "setp.lt.u32 %p1, %r1, 5;\n";
    assert_eq!(words(&format!("{test}vote.sync.ballot.b32 %r4, %p1, -1;")), all(31));
    let vote = |m: &str, p: &str| {
        words(&format!("{test}vote.sync.{m}.pred %p2, {p}, -1;\nselp.u32 %r4, 1, 0, %p2;"))
    };
    assert_eq!(vote("any", "%p1"), all(1));
    assert_eq!(vote("all", "!%p1"), all(0));
    assert_eq!(vote("uni", "%p1"), all(0));
    let matched = words("shr.u32 %r5, %r1, 3;\nmatch.any.sync.b32 %r4, %r5, -1;");
    let want: Vec<u32> = (0..32).map(|l| 0xff << (l / 8 * 8)).collect();
    assert_eq!(matched, want);
    assert_eq!(words("match.all.sync.b32 %r4|%p1, %r2, -1;\n@!%p1 trap;"), all(u32::MAX));
    assert_eq!(words("redux.sync.add.u32 %r4, %r1, -1;"), all(31 * 16));
    assert_eq!(words("neg.s32 %r5, %r1;\nredux.sync.min.s32 %r4, %r5, -1;"), all(-31i32 as u32));
    assert_eq!(words("elect.sync %r4|%p1, -1;\n@%p1 add.u32 %r4, %r4, 100;")[..2], [100, 0]);
    assert_eq!(
        words(
            "setp.gt.u32 %p1, %r1, 3;\nmov.u32 %r4, 0;\n@%p1 bra E;\n\
                      activemask.b32 %r4;\nE:"
        )[..5],
        [15, 15, 15, 15, 0]
    );
    let masks = words(
        "mov.u32 %r4, %lanemask_lt;\nmov.u32 %r5, %lanemask_ge;\nnot.b32 %r5, %r5;\n\
                       setp.ne.u32 %p1, %r4, %r5;\n@%p1 trap;",
    );
    assert_eq!(masks[5], 31);
}

/// Row and column of element `i` of a lane's fragment, as the tables of the ISA give them. `per`
/// is the number of elements in a register.
fn place_a(lane: usize, i: usize, per: usize) -> (usize, usize) {
    let (group, thread) = (lane / 4, lane % 4);
    let register = i / per;
    let row = if register.is_multiple_of(2) { group } else { group + 8 };
    (row, thread * per + i % per + if register >= 2 { 4 * per } else { 0 })
}

fn place_b(lane: usize, i: usize, per: usize) -> (usize, usize) {
    let (group, thread) = (lane / 4, lane % 4);
    (thread * per + i % per + if i >= per { 4 * per } else { 0 }, group)
}

/// Runs one `mma` on small integers and compares with the plain product.
fn product(shape: &str, k: usize, per: usize, integer: bool, encode: impl Fn(i32) -> u32) {
    let a = |r: usize, c: usize| (r * 3 + c * 5) as i32 % 7 - 3;
    let b = |r: usize, c: usize| (r * 2 + c * 11) as i32 % 5 - 2;
    let bits = 32 / per;
    let (na, nb) = (16 * k / 32 / per, 8 * k / 32 / per);
    let pack = |lane: usize,
                reg: usize,
                place: fn(usize, usize, usize) -> (usize, usize),
                m: &dyn Fn(usize, usize) -> i32| {
        (0..per).fold(0u32, |w, j| {
            let (row, col) = place(lane, reg * per + j, per);
            w | encode(m(row, col)) << (j * bits)
        })
    };
    let mut input = Vec::new();
    for lane in 0..32 {
        let words = (0..na).map(|r| pack(lane, r, place_a, &a));
        let words: Vec<u32> = words.chain((0..nb).map(|r| pack(lane, r, place_b, &b))).collect();
        input.extend(words.iter().flat_map(|w| w.to_le_bytes()));
    }
    let count = na + nb;
    let mut body = format!(
        "mul.lo.u32 %r5, %r1, {};\ncvt.u64.u32 %rd3, %r5;\nadd.s64 %rd3, %rd1, %rd3;\n",
        4 * count
    );
    for i in 0..count {
        body += &format!("ld.global.u32 %r{}, [%rd3+{}];\n", 10 + i, 4 * i);
    }
    let regs = |from: usize, n: usize| {
        let list: Vec<String> = (from..from + n).map(|i| format!("%r{i}")).collect();
        format!("{{{}}}", list.join(","))
    };
    let one = if integer { "1" } else { "0f3F800000" };
    for i in 0..4 {
        body += &format!("mov.b32 %r{}, {one};\n", 30 + i);
    }
    body += &format!(
        "mma.sync.aligned.{shape} {}, {}, {}, {};\nmad.wide.u32 %rd4, %r1, 16, %rd2;\n\
         st.global.v4.u32 [%rd4], {};",
        regs(30, 4),
        regs(10, na),
        regs(10 + na, nb),
        regs(30, 4),
        regs(30, 4)
    );
    let module = Module::parse(&kernel(&body)).unwrap_or_else(|e| panic!("{e}\n{body}"));
    let mut vm = ptxvm::Vm::new(common::config(0));
    let gpu = vm.add_device("gpu0");
    let (p, q) = (vm.alloc(gpu, "p", 4096, 16), vm.alloc(gpu, "q", 4096, 16));
    vm.write(p, &input).unwrap();
    let args = [ptxvm::Arg::U64(p), ptxvm::Arg::U64(q)];
    vm.launch(gpu, &module, "k", 1, 32, 0, &args).unwrap();
    vm.run(u64::MAX);
    assert!(vm.findings().is_empty());
    let mut raw = [0; 512];
    vm.read(q, &mut raw).unwrap();
    for lane in 0..32 {
        for i in 0..4 {
            let (row, col) = (lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
            let want: i32 = 1 + (0..k).map(|j| a(row, j) * b(j, col)).sum::<i32>();
            let at = (lane * 4 + i) * 4;
            let word = u32::from_le_bytes(raw[at..at + 4].try_into().unwrap());
            let got = if integer { word as i32 } else { f32::from_bits(word) as i32 };
            assert_eq!(got, want, "{shape} row {row} column {col}");
        }
    }
}

#[test]
fn matrix_products() {
    let half = |x: i32| u32::from(f16::from_f32(x as f32).to_bits());
    let brain = |x: i32| u32::from(bf16::from_f32(x as f32).to_bits());
    let float = |x: i32| (x as f32).to_bits();
    let byte = |x: i32| (x as u8).into();
    product("m16n8k16.row.col.f32.f16.f16.f32", 16, 2, false, half);
    product("m16n8k8.row.col.f32.f16.f16.f32", 8, 2, false, half);
    product("m16n8k16.row.col.f32.bf16.bf16.f32", 16, 2, false, brain);
    product("m16n8k8.row.col.f32.bf16.bf16.f32", 8, 2, false, brain);
    product("m16n8k8.row.col.f32.tf32.tf32.f32", 8, 1, false, float);
    product("m16n8k4.row.col.f32.tf32.tf32.f32", 4, 1, false, float);
    product("m16n8k32.row.col.s32.s8.s8.s32", 32, 4, true, byte);
    product("m16n8k16.row.col.s32.s8.s8.s32", 16, 4, true, byte);
}

#[test]
fn matrix_moves() {
    // Store with stmatrix, load transposed: element (r, c) comes back as (c, r).
    let body = "shl.b32 %r5, %r1, 4;\nadd.u32 %r5, %r3, %r5;\nadd.u32 %r6, %r1, %r1;\n\
                add.u32 %r7, %r6, 1;\nshl.b32 %r7, %r7, 16;\nor.b32 %r6, %r6, %r7;\n\
                stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r5], {%r6};\nbar.warp.sync -1;\n\
                ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r4}, [%r5];";
    for (lane, word) in words(body).into_iter().enumerate() {
        let at = |row: usize, col: usize| (row * 8 + col) as u32;
        let (row, col) = (lane / 4, lane % 4 * 2);
        assert_eq!(word, at(col, row) | at(col + 1, row) << 16);
    }
}

#[test]
fn calls_and_jumps() {
    let text = kernel(
        "{ .param .b32 a; .param .b32 b; st.param.b32 [a], %r1; call.uni (b), twice, (a);\n\
         ld.param.b32 %r4, [b]; }\nand.b32 %r5, %r1, 3;\nT: .branchtargets A, B, C, B;\n\
         brx.idx %r5, T;\nA:\nadd.u32 %r4, %r4, 100;\nbra E;\nB:\nadd.u32 %r4, %r4, 200;\nbra E;\n\
         C:\nadd.u32 %r4, %r4, 300;\nE:\nmad.wide.u32 %rd3, %r1, 4, %rd2;\n\
         st.global.u32 [%rd3], %r4;",
    );
    let function = ".func (.param .b32 r) twice(.param .b32 x) { .reg .b32 %a<3>; .reg .pred %p;\n\
                    ld.param.b32 %a1, [x]; setp.gt.u32 %p, %a1, 20; @%p bra BIG;\n\
                    add.u32 %a1, %a1, %a1; BIG: st.param.b32 [r], %a1; ret; }\n.visible .entry";
    let mut ran = run_module(&text.replace(".visible .entry", function), 1, 32, 3);
    assert!(ran.vm.findings().is_empty(), "{}", ran.list());
    let q = ran.q;
    for (lane, got) in ran.u32s(q, 32).into_iter().enumerate() {
        let base = if lane > 20 { lane } else { 2 * lane };
        assert_eq!(got as usize, base + [100, 200, 300, 200][lane % 4]);
    }
}

#[test]
fn addresses_of_every_space() {
    let body = "mov.u64 %rd3, s;\ncvta.shared.u64 %rd4, %rd3;\nst.u32 [%rd4], 5;\n\
                isspacep.shared %p1, %rd4;\n@!%p1 trap;\nisspacep.global %p1, %rd4;\n@%p1 trap;\n\
                ld.shared.u32 %r4, [s];\nsetp.ne.u32 %p2, %r4, 5;\n@%p2 trap;\n\
                mov.u64 %rd5, loc;\ncvta.local.u64 %rd5, %rd5;\nst.u64 [%rd5+8], %rd1;\n\
                ld.local.u64 %rd6, [loc+8];\nsetp.ne.u64 %p3, %rd6, %rd1;\n@%p3 trap;\n\
                cvta.to.global.u64 %rd7, %rd1;\nst.global.u32 [%rd7], 1;\nld.u32 %r5, [%rd1];";
    clean(body, 1, 1);
}

#[test]
fn unknown_text_is_an_error_with_its_line() {
    let error = |body: &str| Module::parse(&kernel(body)).unwrap_err();
    let line = |body: &str, word: &str| {
        let text = kernel(body);
        1 + text.lines().position(|l| l.contains(word)).unwrap() as u32
    };
    for (body, word, says) in [
        ("mov.u32 %r4, 1;\nfrobnicate.b32 %r4, %r4;", "frob", "unknown instruction frobnicate"),
        ("\n\nadd.turbo.u32 %r4, %r4, 1;", "turbo", "modifier .turbo"),
        ("ld.relaxed.global.u32 %r4, [%rd1];", "relaxed", "scope"),
        ("bra NOWHERE;", "NOWHERE", "no label NOWHERE"),
        ("add.u32 %r4, %r99, 1;", "%r99", "unknown register %r99"),
        ("wgmma.fence.sync.aligned;", "wgmma", "unknown instruction wgmma"),
        ("ld.global.v4.u32 {%r4, %r5}, [%rd1];", "v4", "4 registers"),
        ("cvt.f16.f32 %h1, %f1;", "cvt", "rounding"),
    ] {
        let e = error(body);
        assert_eq!(e.line, line(body, word), "{e}");
        assert!(e.message.contains(says), "{e}");
    }
}
