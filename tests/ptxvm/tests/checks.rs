//! Every check with a clean kernel and a planted mistake.

use crate::common;
use crate::common::{BUFFER, clean, config, kernel, planted, run_module};
use ptxvm::{Arg, FindingKind, Module, RunState, Vm, VmConfig};

#[test]
fn bounds() {
    let body = |last: u32| {
        format!(
            "add.u32 %r4, %r1, {last};\nmul.wide.u32 %rd3, %r4, 4;\nadd.s64 %rd3, %rd1, %rd3;\n\
             st.global.u32 [%rd3], %r1;"
        )
    };
    clean(&body(992), 1, 32);
    let f = planted(&body(993), 1, 32, FindingKind::OutOfBounds, "st.global");
    assert!(f.message.contains("0x0 bytes past the end of p"), "{f}");
    assert_eq!(f.lane, 31);
    let tail = |offset: u32| format!("ld.global.v4.u32 {{%r4,%r5,%r6,%r7}}, [%rd1+{offset}];");
    clean(&tail(4080), 1, 1);
    planted(&tail(4096), 1, 1, FindingKind::OutOfBounds, "v4");
    planted("st.shared.u32 [s+4096], %r1;", 1, 1, FindingKind::OutOfBounds, "st.shared");
    planted("st.local.u32 [loc+64], %r1;", 1, 1, FindingKind::OutOfBounds, "st.local");
    planted("st.global.u32 [8], %r1;", 1, 1, FindingKind::OutOfBounds, "st.global");
}

#[test]
fn alignment() {
    let body = |offset: u32| format!("ld.global.v4.f32 {{%f1,%f2,%f3,%f4}}, [%rd1+{offset}];");
    clean(&body(16), 1, 1);
    planted(&body(8), 1, 1, FindingKind::Misaligned, "v4");
    planted("st.shared.u64 [s+4], %rd1;", 1, 1, FindingKind::Misaligned, "st.shared");
}

#[test]
fn unwritten_memory_and_registers() {
    let kind = FindingKind::UninitialisedMemory;
    clean("st.shared.u16 [s+2], %r1;\nld.shared.u16 %r4, [s+2];", 1, 1);
    planted("st.shared.u16 [s+2], %r1;\nld.shared.u32 %r4, [s];", 1, 1, kind, "ld.shared");
    clean("st.global.u32 [%rd2], %r1;\nld.global.u32 %r4, [%rd2];", 1, 1);
    let f = planted("ld.global.u32 %r4, [%rd2+8];", 1, 1, kind, "ld.global");
    assert_eq!(f.place.as_deref(), Some("q+0x8"));
    clean("st.local.u32 [loc], %r1;\nld.local.u32 %r4, [loc];", 1, 1);
    planted("ld.local.u32 %r4, [loc+4];", 1, 1, kind, "ld.local");
    planted("atom.global.add.u32 %r4, [%rd2], 1;", 1, 1, kind, "atom");
    let kind = FindingKind::UninitialisedRegister;
    clean("setp.lt.u32 %p1, %r1, 32;\n@%p1 mov.u32 %r4, 1;\nadd.u32 %r5, %r4, 1;", 1, 32);
    let some = "setp.lt.u32 %p1, %r1, 9;\n@%p1 mov.u32 %r4, 1;\nadd.u32 %r5, %r4, 1;";
    assert_eq!(planted(some, 1, 32, kind, "add.u32").lane, 9);
}

/// Neighbouring threads exchange a value through shared memory.
fn exchange(sync: &str) -> String {
    format!(
        "shl.b32 %r4, %r1, 2;\nadd.u32 %r4, %r3, %r4;\nst.shared.u32 [%r4], %r1;\n{sync}\n\
         xor.b32 %r5, %r1, 1;\nshl.b32 %r5, %r5, 2;\nadd.u32 %r5, %r3, %r5;\n\
         ld.shared.u32 %r6, [%r5];"
    )
}

#[test]
fn races_in_a_block() {
    clean(&exchange("bar.sync 0;"), 2, 64);
    clean(&exchange("bar.warp.sync -1;"), 1, 64);
    clean(&exchange("barrier.cta.sync.aligned 3, 64;"), 1, 64);
    planted(&exchange(""), 1, 64, FindingKind::DataRace, "ld.shared");
    // A fence orders nothing by itself, nor does a shuffle.
    planted(&exchange("membar.cta;"), 1, 64, FindingKind::DataRace, "ld.shared");
    let shuffle = "shfl.sync.idx.b32 %r7|%p1, %r1, 0, 31, -1;";
    planted(&exchange(shuffle), 1, 64, FindingKind::DataRace, "ld.shared");
    planted("st.global.u32 [%rd1], %r1;", 1, 64, FindingKind::DataRace, "st.global");
    // Different bytes of a word do not conflict.
    clean("cvt.u64.u32 %rd3, %r1;\nadd.s64 %rd3, %rd1, %rd3;\nst.global.u8 [%rd3], %r1;", 1, 64);
    clean("red.global.add.u32 [%rd1], 1;", 2, 64);
    let mixed = "red.global.add.u32 [%rd1], 1;\nld.global.u32 %r4, [%rd1];";
    planted(mixed, 2, 64, FindingKind::DataRace, "global");
}

/// Block 0 writes data and raises a flag, block 1 waits for it and reads the data.
fn message(signal: &str, wait: &str) -> String {
    format!(
        "setp.ne.u32 %p1, %r2, 0;\n@%p1 bra READ;\nst.global.u32 [%rd2], 7;\n{signal}\nret;\n\
         READ:\n{wait}\nsetp.eq.u32 %p2, %r4, 0;\n@%p2 bra READ;\nFENCE\n\
         ld.global.u32 %r5, [%rd2];"
    )
}

fn with(body: String, fence: &str) -> String {
    body.replace("FENCE", fence)
}

#[test]
fn release_and_acquire() {
    let race = FindingKind::DataRace;
    let acquire = "ld.acquire.gpu.global.u32 %r4, [%rd1];";
    let relaxed = "ld.relaxed.gpu.global.u32 %r4, [%rd1];";
    let release = "st.release.gpu.global.u32 [%rd1], 1;";
    let fenced = "fence.acq_rel.gpu;\nst.relaxed.gpu.global.u32 [%rd1], 1;";
    let add = "red.release.gpu.global.add.u32 [%rd1], 1;";
    let fence = "fence.acq_rel.gpu;";
    clean(&with(message(release, acquire), ""), 2, 1);
    clean(&with(message(fenced, acquire), ""), 2, 1);
    clean(&with(message(add, relaxed), fence), 2, 1);
    clean(&with(message(fenced, relaxed), fence), 2, 1);
    clean(&with(message("membar.gl;\nst.volatile.global.u32 [%rd1], 1;", acquire), ""), 2, 1);
    let f = planted(&with(message(release, relaxed), ""), 2, 1, race, "ld.global.u32 %r5");
    assert!(f.message.contains("block 0") && f.message.contains("write at line"), "{f}");
    assert_eq!(f.place.as_deref(), Some("q+0x0"));
    let plain = "st.relaxed.gpu.global.u32 [%rd1], 1;";
    planted(&with(message(plain, acquire), ""), 2, 1, race, "ld.global.u32 %r5");
    let late = "st.relaxed.gpu.global.u32 [%rd1], 1;\nfence.acq_rel.gpu;";
    planted(&with(message(late, acquire), ""), 2, 1, race, "ld.global.u32 %r5");
    let narrow = "st.release.cta.global.u32 [%rd1], 1;";
    planted(&with(message(narrow, acquire), ""), 2, 1, race, "ld.global.u32 %r5");
    let narrow_fence = "fence.acq_rel.cta;\nst.relaxed.gpu.global.u32 [%rd1], 1;";
    planted(&with(message(narrow_fence, acquire), ""), 2, 1, race, "ld.global.u32 %r5");
    planted(&with(message(release, relaxed), "fence.acq_rel.cta;"), 2, 1, race, "%r5");
    // A weak store of the flag races with the poll itself.
    let weak = "st.global.u32 [%rd1], 1;";
    planted(&with(message(weak, acquire), ""), 2, 1, race, "[%rd1]");
}

#[test]
fn scopes_between_devices() {
    let run = |signal: &str, wait: &str| {
        let text = kernel(&with(message(signal, wait), "")).replace(
            "mov.u32 %r2, %ctaid.x;",
            // The device number arrives in the buffer's first word of the last page.
            "ld.param.u32 %r2, [dev];",
        );
        let text = text.replace(".param .u64 q)", ".param .u64 q, .param .u32 dev)");
        let module = Module::parse(&text).unwrap();
        let mut kinds = Vec::new();
        for seed in common::SEEDS {
            let mut vm = Vm::new(config(seed));
            let (a, b) = (vm.add_device("gpu0"), vm.add_device("gpu1"));
            let (p, q) = (vm.alloc(b, "flag", 64, 64), vm.alloc(b, "data", 64, 64));
            vm.fill(p, 0, 64).unwrap();
            for (device, number) in [(a, 0), (b, 1)] {
                let args = [Arg::U64(p), Arg::U64(q), Arg::U32(number)];
                vm.launch(device, &module, "k", 1, 1, 64, &args).unwrap();
            }
            assert_eq!(vm.run(u64::MAX), RunState::Finished);
            kinds.push(vm.findings().iter().any(|f| f.kind == FindingKind::DataRace));
        }
        kinds
    };
    let release = "st.release.sys.global.u32 [%rd1], 1;";
    let acquire = "ld.acquire.sys.global.u32 %r4, [%rd1];";
    assert!(run(release, acquire).iter().all(|race| !race));
    assert!(run(&release.replace("sys", "gpu"), acquire).iter().all(|race| *race));
    assert!(run(release, &acquire.replace("sys", "gpu")).iter().all(|race| *race));
}

#[test]
fn barriers() {
    let kind = FindingKind::Barrier;
    let two_of_three =
        |count: u32| format!("setp.ge.u32 %p1, %r1, 64;\n@%p1 ret;\nbar.sync 1, {count};");
    clean(&two_of_three(64), 1, 96);
    let f = planted(&two_of_three(96), 1, 96, kind, "bar.sync");
    assert!(
        f.message.contains("wait in barrier 1: block 0 warp 0 lanes 0xffffffff, block 0 warp 1"),
        "{f}"
    );
    let early = "setp.ge.u32 %p1, %r1, 32;\n@%p1 ret;\nbar.sync 0;";
    planted(early, 1, 64, kind, "bar.sync");
    let counts = "setp.ge.u32 %p1, %r1, 32;\nselp.u32 %r4, 64, 96, %p1;\nbar.sync 1, %r4;";
    planted(counts, 1, 64, kind, "bar.sync");
    // Half a warp waits at one barrier, half at another.
    let split = "and.b32 %r4, %r1, 1;\nsetp.eq.u32 %p1, %r4, 0;\n@%p1 bra A;\nbar.sync 1;\n\
                 bra B;\nA:\nbar.sync 2;\nB:";
    planted(split, 1, 32, FindingKind::WarpSync, "bar.sync");
    // Producers arrive, consumers wait.
    let arrive = |arrive: &str| {
        format!(
            "setp.ge.u32 %p1, %r1, 32;\n@%p1 bra C;\nshl.b32 %r4, %r1, 2;\nadd.u32 %r4, %r3, %r4;\n\
             st.shared.u32 [%r4], %r1;\n{arrive}\nret;\nC:\nbar.sync 2, 64;\n\
             ld.shared.u32 %r5, [s];"
        )
    };
    clean(&arrive("bar.arrive 2, 64;"), 1, 64);
    let late = "bar.arrive 2, 64;\nst.shared.u32 [%r4], %r1;";
    planted(&arrive(late), 1, 64, FindingKind::DataRace, "shared");
    let votes = "setp.lt.u32 %p1, %r1, 40;\nbar.red.popc.u32 %r4, 0, %p1;\n\
                 setp.ne.u32 %p2, %r4, 40;\n@%p2 trap;\nbar.red.and.pred %p3, 0, %p1;\n\
                 @%p3 trap;\nbar.red.or.pred %p4, 0, !%p1;\n@!%p4 trap;";
    clean(votes, 1, 64);
}

#[test]
fn warp_wide_members() {
    let kind = FindingKind::WarpSync;
    clean("shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;", 1, 32);
    planted("shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;", 1, 16, kind, "shfl");
    planted("shfl.sync.bfly.b32 %r4, %r1, 16, 31, 0xffff;", 1, 32, kind, "shfl");
    let half = "setp.ge.u32 %p1, %r1, 16;\n@%p1 bra E;\nvote.sync.any.pred %p2, %p1, MASK;\nE:";
    clean(&half.replace("MASK", "0xffff"), 1, 32);
    planted(&half.replace("MASK", "-1"), 1, 32, kind, "vote");
}

#[test]
fn hangs() {
    let spin = "L:\nld.relaxed.gpu.global.u32 %r4, [%rd1];\nsetp.ne.u32 %p1, %r4, TARGET;\n\
                red.relaxed.gpu.global.max.u32 [%rd1], 4;\n@%p1 bra L;";
    clean(&spin.replace("TARGET", "4"), 1, 32);
    let text = kernel(&spin.replace("TARGET", "5"));
    let ran = run_module(&text, 2, 32, 3);
    assert_eq!(ran.state, RunState::Stuck);
    assert!(ran.vm.findings().iter().any(|f| f.kind == FindingKind::NoProgress), "{}", ran.list());
    // A lock between lanes of one warp needs independent progress.
    let lock = "L:\natom.acquire.gpu.global.cas.b32 %r4, [%rd1], 0, 1;\n\
                setp.ne.u32 %p1, %r4, 0;\n@%p1 bra L;\nld.global.u32 %r5, [%rd1+64];\n\
                add.u32 %r5, %r5, 1;\nst.global.u32 [%rd1+64], %r5;\n\
                st.release.gpu.global.u32 [%rd1], 0;";
    clean(lock, 2, 40);
    let mut ran = run_module(&kernel(lock), 2, 40, 1);
    let p = ran.p;
    assert_eq!(ran.u32s(p + 64, 1), [80]);
    planted(&lock.replace("st.release", "st.relaxed"), 2, 40, FindingKind::DataRace, "%rd1+64");
}

#[test]
fn deadline_by_the_clock() {
    let body = "mov.u64 %rd3, %globaltimer;\nL:\nnanosleep.u32 100;\nmov.u64 %rd4, %globaltimer;\n\
                sub.u64 %rd4, %rd4, %rd3;\nsetp.lt.u64 %p1, %rd4, 50000;\n@%p1 bra L;\n\
                st.global.u64 [%rd2], %rd4;";
    let mut ran = run_module(&kernel(body), 1, 1, 0);
    let q = ran.q;
    assert!(ran.vm.findings().is_empty(), "{}", ran.list());
    assert!((50_000..51_000).contains(&ran.u32s(q, 1)[0]));
}

#[test]
fn limits_and_traps() {
    let text = kernel("L:\nred.global.add.u32 [%rd1], 1;\nbra L;");
    let module = Module::parse(&text).unwrap();
    let mut vm = Vm::new(VmConfig { step_limit: 5000, ..VmConfig::default() });
    let gpu = vm.add_device("gpu0");
    let p = vm.alloc(gpu, "p", BUFFER, 8);
    vm.fill(p, 0, BUFFER).unwrap();
    vm.launch(gpu, &module, "k", 1, 32, 0, &[Arg::U64(p), Arg::U64(p)]).unwrap();
    assert_eq!(vm.run(1000), RunState::Running);
    vm.expect_finished();
    assert_eq!(vm.findings()[0].kind, FindingKind::StillRunning);
    assert_eq!(vm.run(u64::MAX), RunState::Stuck);
    planted("setp.eq.u32 %p1, %r1, 5;\n@%p1 trap;", 2, 32, FindingKind::Trap, "trap");
}

#[test]
fn notes_name_the_task() {
    let text =
        kernel("st.global.u32 [%rd1], 17;\nst.shared.u32 [s], 3;\nld.global.u32 %r4, [%rd2];");
    let module = Module::parse(&text).unwrap();
    let mut vm = Vm::new(VmConfig::default());
    let gpu = vm.add_device("gpu0");
    let (p, q) = (vm.alloc(gpu, "p", 64, 8), vm.alloc(gpu, "q", 64, 8));
    vm.set_annotator(move |view| {
        let (mut task, mut stage) = ([0; 4], [0; 4]);
        assert!(view.read(p, &mut task) && view.read_shared(1024, &mut stage));
        assert!(!view.read(p + 64, &mut task) && !view.read_shared(0, &mut stage));
        assert!(!view.read_shared(1028, &mut stage), "nothing has written there");
        Some(format!("task {} stage {}", u32::from_le_bytes(task), u32::from_le_bytes(stage)))
    });
    vm.launch(gpu, &module, "k", 1, 1, 16, &[Arg::U64(p), Arg::U64(q)]).unwrap();
    vm.run(u64::MAX);
    assert_eq!(vm.findings()[0].note.as_deref(), Some("task 17 stage 3"));
    assert!(vm.findings()[0].to_string().ends_with("lane 0; task 17 stage 3"));
}

#[test]
fn same_seed_same_run() {
    let body = exchange("bar.sync 0;") + "\nred.global.add.u32 [%rd1], %r6;";
    let steps = |seed| run_module(&kernel(&body), 3, 96, seed).vm.time_ns();
    let order = |seed| {
        let text = kernel(
            "atom.global.add.u32 %r4, [%rd1], 1;\nmad.wide.u32 %rd3, %r4, 4, %rd2;\n\
                           shl.b32 %r5, %r2, 16;\nor.b32 %r5, %r5, %r1;\n\
                           st.global.u32 [%rd3], %r5;",
        );
        let mut ran = run_module(&text, 4, 64, seed);
        let q = ran.q;
        ran.u32s(q, 256)
    };
    assert_eq!(steps(5), steps(5));
    assert_eq!(order(8), order(8));
    assert_ne!(order(8), order(9));
}
