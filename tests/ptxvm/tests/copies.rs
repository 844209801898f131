//! mbarriers and asynchronous copies, with planted mistakes.

use crate::common;
use crate::common::{clean, kernel, planted, run_module};
use ptxvm::{FindingKind, RunState};

/// Thread 0 loads 256 bytes of p into shared memory at s+128, and all threads read them.
const BULK: &str = "setp.ne.u32 %p1, %r1, 0;
@%p1 bra GO;
mbarrier.init.shared.b64 [s], 1;
fence.mbarrier_init.release.cluster;
mbarrier.arrive.expect_tx.shared::cta.b64 %rd5, [s], 256;
add.u32 %r4, %r3, 128;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%rd1], 256, [s];
GO:
bar.sync 0;
W:
mbarrier.try_wait.parity.shared.b64 %p2, [s], 0;
@!%p2 bra W;
shl.b32 %r5, %r1, 2;
add.u32 %r5, %r3, %r5;
ld.shared.u32 %r6, [%r5+128];
";

#[test]
fn bulk_load() {
    clean(BULK, 1, 64);
    let wait = "mbarrier.try_wait.parity.shared.b64 %p2, [s], 0;\n@!%p2 bra W;\n";
    assert!(BULK.contains(wait));
    let unwaited = BULK.replace(wait, "");
    for seed in common::SEEDS {
        // Either the copy has not come, or it has and nothing orders it.
        let ran = run_module(&kernel(&unwaited), 1, 64, seed);
        let hit =
            ran.vm.findings().iter().any(|f| {
                matches!(f.kind, FindingKind::DataRace | FindingKind::UninitialisedMemory)
            });
        assert!(hit, "seed {seed}: {}", ran.list());
    }
    let wrong = BULK.replace("[s], 256;\nadd", "[s], 512;\nadd");
    let ran = run_module(&kernel(&wrong), 1, 64, 1);
    assert_eq!(ran.state, RunState::Stuck);
    assert!(ran.vm.findings().iter().any(|f| f.kind == FindingKind::NoProgress), "{}", ran.list());
    let small = BULK.replace("[%rd1], 256", "[%rd1], 250");
    planted(&small, 1, 64, FindingKind::Misaligned, "cp.async.bulk");
    let far = BULK.replace("[%rd1], 256", "[%rd1+3968], 256");
    planted(&far, 1, 64, FindingKind::OutOfBounds, "cp.async.bulk");
    let uninitialised = BULK.replace("mbarrier.init.shared.b64 [s], 1;\n", "");
    planted(&uninitialised, 1, 64, FindingKind::Mbarrier, "arrive");
    let unordered = BULK.replace("bar.sync 0;\n", "");
    for seed in common::SEEDS {
        let ran = run_module(&kernel(&unordered), 1, 64, seed);
        assert!(!ran.vm.findings().is_empty(), "seed {seed}");
    }
}

#[test]
fn page_is_overwritten_only_when_released() {
    // After the first page is read, thread 0 loads another over it.
    let again = |between: &str| {
        BULK.replace(
            "mbarrier.init.shared.b64 [s], 1;",
            "mbarrier.init.shared.b64 [s], 1;\n\
                      mbarrier.init.shared.b64 [s+8], 64;",
        ) + between
            + "\n@%p1 bra E;\nmbarrier.arrive.expect_tx.shared::cta.b64 _, [s], 256;\n\
               cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], \
               [%rd1+256], 256, [s]; // second\nE:\nX:\nmbarrier.try_wait.parity.shared.b64 %p3, [s], 1;\n\
               @!%p3 bra X;"
    };
    let released = "mbarrier.arrive.shared.b64 %rd6, [s+8];\n@%p1 bra E;\nV:\n\
                    mbarrier.try_wait.parity.shared.b64 %p3, [s+8], 0;\n@!%p3 bra V;";
    clean(&again(released), 1, 64);
    clean(&again("bar.sync 0;"), 1, 64);
    planted(&again(""), 1, 64, FindingKind::DataRace, "");
    let relaxed = released.replace("arrive.shared", "arrive.relaxed.cta.shared");
    planted(&again(&relaxed), 1, 64, FindingKind::DataRace, "second");
}

#[test]
fn bulk_store() {
    let store = |fence: &str, wait: &str| {
        format!(
            "shl.b32 %r4, %r1, 2;\nadd.u32 %r4, %r3, %r4;\nst.shared.u32 [%r4], %r1;\n{fence}\n\
             bar.sync 0;\nsetp.ne.u32 %p1, %r1, 0;\n@%p1 ret;\n\
             cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r3], 256;\n\
             cp.async.bulk.commit_group;\n{wait}\nld.global.u32 %r5, [%rd2+4];"
        )
    };
    clean(&store("fence.proxy.async.shared::cta;", "cp.async.bulk.wait_group 0;"), 1, 64);
    let kind = FindingKind::ProxyRace;
    planted(&store("", "cp.async.bulk.wait_group 0;"), 1, 64, kind, "cp.async.bulk.global");
    for seed in common::SEEDS {
        let text = kernel(&store("fence.proxy.async;", "cp.async.bulk.wait_group 1;"));
        assert!(!run_module(&text, 1, 64, seed).vm.findings().is_empty());
    }
}

#[test]
fn small_copies() {
    let copy = |wait: &str| {
        format!(
            "shl.b32 %r4, %r1, 4;\nadd.u32 %r5, %r3, %r4;\ncvt.u64.u32 %rd3, %r4;\n\
             add.s64 %rd3, %rd1, %rd3;\ncp.async.cg.shared.global [%r5+64], [%rd3], 16;\n{wait}\n\
             ld.shared.u32 %r6, [%r5+64];"
        )
    };
    clean(&copy("cp.async.wait_all;"), 1, 64);
    clean(&copy("cp.async.commit_group;\ncp.async.wait_group 0;"), 1, 64);
    for wait in ["", "cp.async.commit_group;\ncp.async.wait_group 1;"] {
        for seed in common::SEEDS {
            let ran = run_module(&kernel(&copy(wait)), 1, 64, seed);
            assert!(!ran.vm.findings().is_empty(), "seed {seed} {wait}");
        }
    }
    // Waiting orders one's own copies only: the neighbour's need a barrier too.
    let other = copy(
        "cp.async.wait_all;\nxor.b32 %r7, %r1, 1;\nshl.b32 %r7, %r7, 4;\n\
                      add.u32 %r5, %r3, %r7;",
    );
    let synced = other.replace("wait_all;", "wait_all;\nbar.sync 0;");
    clean(&synced, 1, 64);
    for seed in common::SEEDS {
        let ran = run_module(&kernel(&other), 1, 64, seed);
        assert!(!ran.vm.findings().is_empty(), "seed {seed}");
    }
}

/// 64 threads copy, and a barrier tells all of them when the page is there.
const ARRIVE: &str = "setp.ne.u32 %p1, %r1, 0;
@!%p1 mbarrier.init.shared.b64 [s], 64;
bar.sync 0;
shl.b32 %r4, %r1, 4;
add.u32 %r5, %r3, %r4;
cvt.u64.u32 %rd3, %r4;
add.s64 %rd3, %rd1, %rd3;
cp.async.ca.shared.global [%r5+64], [%rd3], 16;
cp.async.mbarrier.arrive.noinc.shared.b64 [s];
W:
mbarrier.test_wait.parity.shared.b64 %p2, [s], 0;
@!%p2 bra W;
xor.b32 %r5, %r5, 16;
ld.shared.u32 %r6, [%r5+64];
";

#[test]
fn copies_that_arrive() {
    clean(ARRIVE, 1, 64);
    // Without .noinc each arrival raises the count that it lowers: the phase never ends.
    let ran = run_module(&kernel(&ARRIVE.replace(".noinc", "")), 1, 64, 2);
    assert_eq!(ran.state, RunState::Stuck);
    // A count that is too small lets the readers go before the last copies.
    let few = ARRIVE.replace("[s], 64", "[s], 48");
    planted(&few, 1, 64, FindingKind::DataRace, "");
    let early = ARRIVE
        .replace("cp.async.mbarrier.arrive.noinc.shared.b64 [s];\n", "")
        .replace("cp.async.ca", "cp.async.mbarrier.arrive.noinc.shared.b64 [s];\ncp.async.ca");
    for seed in common::SEEDS {
        let ran = run_module(&kernel(&early), 1, 64, seed);
        assert!(!ran.vm.findings().is_empty(), "seed {seed}");
    }
}

#[test]
fn mbarrier_misuse() {
    let kind = FindingKind::Mbarrier;
    let init = "mbarrier.init.shared.b64 [s], 2;\n";
    let arrive = "mbarrier.arrive.shared.b64 %rd5, [s];\n";
    clean(&format!("{init}{arrive}{arrive}{arrive}{arrive}"), 1, 1);
    planted(arrive, 1, 1, kind, "arrive");
    planted("mbarrier.init.shared.b64 [s], 0;", 1, 1, kind, "init");
    let many = format!("{init}mbarrier.arrive.noComplete.shared.b64 %rd5, [s], 3;");
    planted(&many, 1, 1, kind, "noComplete");
    let again = format!("{init}{arrive}mbarrier.init.shared.b64 [s], 1; // again");
    planted(&again, 1, 1, kind, "again");
    planted(&format!("{init}st.shared.u32 [s+4], 1;"), 1, 1, kind, "st.shared");
    planted(&format!("{init}mbarrier.inval.shared.b64 [s];\n{arrive}"), 1, 1, kind, "arrive");
    let state = format!(
        "{init}{arrive}mbarrier.test_wait.shared.b64 %p1, [s], %rd5;\n@%p1 trap;\n{arrive}\
         mbarrier.test_wait.shared.b64 %p1, [s], %rd5;\n@!%p1 trap;\n\
         mbarrier.pending_count.b64 %r4, %rd5;\nsetp.ne.u32 %p2, %r4, 1;\n@%p2 trap;"
    );
    clean(&state, 1, 1);
}
