//! The machine in a thread of its own, talking to the host through mapped memory.

use crate::common::kernel;
use ptxvm::{Arg, FindingKind, Module, RunState, Vm, VmConfig};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Doubles what the host puts into word 0, into word 1, until the host asks for 0xffffffff.
const ECHO: &str = "L:\nld.acquire.sys.global.u32 %r4, [%rd1];\nsetp.eq.u32 %p1, %r4, 0;\n\
                    @%p1 bra L;\nsetp.eq.u32 %p2, %r4, 0xffffffff;\n@%p2 ret;\n\
                    add.u32 %r5, %r4, %r4;\nst.relaxed.sys.global.u32 [%rd1], 0;\n\
                    st.release.sys.global.u32 [%rd1+4], %r5;\nbra L;";

#[test]
fn mailbox() {
    fn sendable<T: Send>() {}
    sendable::<Vm>();
    let words: Arc<[AtomicU32; 4]> = Arc::default();
    let module = Module::parse(&kernel(ECHO)).unwrap();
    let shared = words.clone();
    let machine = std::thread::spawn(move || {
        let mut vm = Vm::new(VmConfig { stall_steps: 1000, ..VmConfig::default() });
        let gpu = vm.add_device("gpu0");
        let ptr = shared.as_ptr().cast_mut().cast::<u8>();
        // SAFETY: `shared` outlives the machine, and both sides only use atomics.
        let at = unsafe { vm.map_host("mailbox", ptr, 16) };
        assert_eq!(at, ptr as u64);
        vm.launch(gpu, &module, "k", 1, 1, 16, &[Arg::U64(at), Arg::U64(0)]).unwrap();
        // Waiting for the host is not being stuck.
        while vm.run(1_000) == RunState::Running {
            std::thread::yield_now();
        }
        vm.findings().to_vec()
    });
    for x in 1..40u32 {
        words[0].store(x, Ordering::Release);
        let answer = loop {
            match words[1].swap(0, Ordering::AcqRel) {
                0 => std::thread::yield_now(),
                y => break y,
            }
        };
        assert_eq!(answer, 2 * x);
    }
    words[0].store(u32::MAX, Ordering::Release);
    let findings = machine.join().unwrap();
    assert!(findings.is_empty(), "{findings:?}");
}

#[test]
fn devices_race_on_host_memory_too() {
    let words: [AtomicU32; 4] = Default::default();
    let module = Module::parse(&kernel("st.global.u32 [%rd1+8], %r2;")).unwrap();
    let mut vm = Vm::new(VmConfig::default());
    let gpu = vm.add_device("gpu0");
    // SAFETY: `words` outlives the machine, which is used in this function only.
    let at = unsafe { vm.map_host("host", words.as_ptr().cast_mut().cast(), 16) };
    vm.launch(gpu, &module, "k", 2, 1, 16, &[Arg::U64(at), Arg::U64(0)]).unwrap();
    assert_eq!(vm.run(u64::MAX), RunState::Finished);
    assert_eq!(vm.findings()[0].kind, FindingKind::DataRace);
    assert_eq!(vm.findings()[0].place.as_deref(), Some("host+0x8"));
}

/// What one thread is blamed for that runs `body` on mapped memory.
fn on_host_memory(body: &str) -> Vec<ptxvm::Finding> {
    let words: [AtomicU32; 4] = Default::default();
    let module = Module::parse(&kernel(body)).unwrap();
    let mut vm = Vm::new(VmConfig::default());
    let gpu = vm.add_device("gpu0");
    // SAFETY: `words` outlives the machine, which is used in this function only.
    let at = unsafe { vm.map_host("host", words.as_ptr().cast_mut().cast(), 16) };
    vm.launch(gpu, &module, "k", 1, 1, 16, &[Arg::U64(at), Arg::U64(0)]).unwrap();
    assert_eq!(vm.run(u64::MAX), RunState::Finished);
    vm.findings().to_vec()
}

#[test]
fn the_host_is_outside_the_device() {
    let blamed = |body: &str| {
        let found = on_host_memory(body);
        assert_eq!(found.len(), 1, "{body}: {found:?}");
        assert_eq!(found[0].kind, FindingKind::DataRace, "{body}");
        found[0].message.clone()
    };
    for access in [
        "ld.acquire.SCOPE.global.u32 %r4, [%rd1];",
        "st.release.SCOPE.global.u32 [%rd1], 1;",
        "atom.relaxed.SCOPE.global.exch.b32 %r4, [%rd1], 1;",
    ] {
        assert!(on_host_memory(&access.replace("SCOPE", "sys")).is_empty(), "{access}");
        assert!(blamed(&access.replace("SCOPE", "gpu")).starts_with("a gpu-scope access"));
    }
    let data = "st.global.u32 [%rd1+8], 7;";
    let flag = "st.relaxed.sys.global.u32 [%rd1], 1;";
    for signal in [
        "st.release.sys.global.u32 [%rd1], 1;",
        "fence.acq_rel.sys;\nst.relaxed.sys.global.u32 [%rd1], 1;",
        // Released before, by another word.
        "st.release.sys.global.u32 [%rd1+4], 1;\nst.relaxed.sys.global.u32 [%rd1], 1;",
    ] {
        assert!(on_host_memory(&format!("{data}\n{signal}")).is_empty(), "{signal}");
    }
    assert!(on_host_memory(&format!("{flag}\n{data}")).is_empty());
    for body in [
        format!("{data}\n{flag}"),
        format!("{data}\nfence.acq_rel.gpu;\n{flag}"),
        format!("fence.acq_rel.sys;\n{data}\n{flag}"),
    ] {
        assert!(blamed(&body).starts_with("the host may see this write before the one at line"));
    }
}

#[test]
fn parts_of_a_heap() {
    let module = Module::parse(&kernel(
        "st.global.u32 [%rd1+12], 1;\nst.global.v2.u32 [%rd1+24], \
                                        {%r1, %r1};\nld.global.u32 %r4, [%rd1+40];",
    ));
    let module = module.unwrap();
    let mut vm = Vm::new(VmConfig::default());
    let gpu = vm.add_device("gpu0");
    let heap = vm.alloc(gpu, "heap", 64, 64);
    vm.name_range(heap + 32, 16, "queue").unwrap();
    vm.forbid(heap + 28, 4).unwrap();
    vm.forbid(heap + 16, 8).unwrap();
    vm.launch(gpu, &module, "k", 1, 1, 16, &[Arg::U64(heap), Arg::U64(0)]).unwrap();
    assert_eq!(vm.run(u64::MAX), RunState::Finished);
    let found: Vec<_> = vm.findings().iter().map(|f| (f.kind, f.place.as_deref())).collect();
    let want = [
        (FindingKind::OutOfBounds, Some("heap+0x18")),
        (FindingKind::UninitialisedMemory, Some("queue+0x8")),
    ];
    assert_eq!(found, want);
}

#[test]
fn read_only_memory() {
    let bad = FindingKind::BadAccess;
    let run = |body: &str| {
        let module = Module::parse(&kernel(body)).unwrap();
        let mut vm = Vm::new(VmConfig::default());
        let gpu = vm.add_device("gpu0");
        let (p, q) = (vm.alloc(gpu, "weights", 256, 64), vm.alloc(gpu, "q", 256, 64));
        vm.fill(p, 1, 256).unwrap();
        vm.set_read_only(p, 256).unwrap();
        vm.launch(gpu, &module, "k", 2, 32, 16, &[Arg::U64(p), Arg::U64(q)]).unwrap();
        assert_eq!(vm.run(u64::MAX), RunState::Finished);
        vm.findings().iter().map(|f| (f.kind, f.line)).collect::<Vec<_>>()
    };
    assert_eq!(run("ld.global.u32 %r4, [%rd1];\nld.global.nc.u32 %r4, [%rd1+4];"), []);
    assert_eq!(run("st.global.u32 [%rd1], 1;")[0].0, bad);
    assert_eq!(run("red.global.add.u32 [%rd1], 1;")[0].0, bad);
    // Its own write, ordered before it, but the cache need not see it.
    let own = "mad.wide.u32 %rd3, %r2, 128, %rd2;\nmad.wide.u32 %rd3, %r1, 4, %rd3;\n\
               st.global.u32 [%rd3], 1;\nld.global.CACHE.u32 %r4, [%rd3];";
    assert_eq!(run(&own.replace("CACHE.", "")), []);
    assert_eq!(run(&own.replace("CACHE", "nc"))[0].0, bad);
}

#[test]
fn refused_launches_and_accesses() {
    let module = Module::parse(&kernel("")).unwrap();
    let mut vm = Vm::new(VmConfig::default());
    let gpu = vm.add_device("gpu0");
    let both = [Arg::U64(0), Arg::U64(0)];
    let error = |r: Result<ptxvm::LaunchId, ptxvm::VmError>| r.unwrap_err().to_string();
    assert_eq!(error(vm.launch(gpu, &module, "x", 1, 1, 0, &both)), "the module has no kernel x");
    let few = vm.launch(gpu, &module, "k", 1, 1, 0, &both[..1]);
    assert_eq!(error(few), "k takes 2 arguments, not 1");
    let narrow = vm.launch(gpu, &module, "k", 1, 1, 0, &[Arg::U32(0), Arg::U64(0)]);
    assert_eq!(error(narrow), "argument 0 has 4 bytes where the kernel wants 8");
    assert!(error(vm.launch(gpu, &module, "k", 1, 1025, 0, &both)).contains("1 to 1024 threads"));
    let at = vm.alloc(gpu, "a", 10, 8);
    assert!(vm.write(at + 8, &[0; 3]).unwrap_err().to_string().contains("a+0x8"));
    assert!(vm.read(1, &mut [0]).is_err());
}
