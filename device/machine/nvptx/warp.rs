//! Exchange between the lanes of a warp.

use core::arch::asm;

use tilert_mk_shared::tile::WARP_LANES;

/// The value of the lane whose index differs by `mask`.
#[inline(always)]
pub fn exchange(value: f32, mask: u32) -> f32 {
    f32::from_bits(exchange_word(value.to_bits(), mask))
}

/// The word of the lane whose index differs by `mask`.
#[inline(always)]
pub fn exchange_word(value: u32, mask: u32) -> u32 {
    let other: u32;
    // SAFETY: all 32 lanes call this together.
    unsafe {
        asm!("shfl.sync.bfly.b32 {o}, {v}, {m}, 0x1f, 0xffffffff;", o = out(reg32) other,
             v = in(reg32) value, m = in(reg32) mask, options(nomem, nostack));
    }
    other
}

/// The value of lane `source`.
#[inline(always)]
pub fn take(value: f32, source: u32) -> f32 {
    f32::from_bits(take_word(value.to_bits(), source))
}

/// The word of lane `source`.
#[inline(always)]
pub fn take_word(value: u32, source: u32) -> u32 {
    let other: u32;
    // SAFETY: all 32 lanes call this together.
    unsafe {
        asm!("shfl.sync.idx.b32 {o}, {v}, {s}, 0x1f, 0xffffffff;", o = out(reg32) other,
             v = in(reg32) value, s = in(reg32) source, options(nomem, nostack));
    }
    other
}

/// The largest word of all lanes, on each of them.
#[inline(always)]
pub fn largest_word(value: u32) -> u32 {
    let largest: u32;
    // SAFETY: all 32 lanes call this together.
    unsafe {
        asm!("redux.sync.max.u32 {l}, {v}, 0xffffffff;", l = out(reg32) largest,
             v = in(reg32) value, options(nomem, nostack));
    }
    largest
}

/// The sum over all lanes, on each of them.
#[inline(always)]
pub fn sum(mut value: f32) -> f32 {
    let mut mask = 16;
    while mask > 0 {
        value += exchange(value, mask);
        mask /= 2;
    }
    value
}

/// Sums `N` values (a power of two up to 32) over all lanes. Lane `l` gets the sum of value
/// `l / (32 / N)`. Every sum pairs lanes that are 16, 8, 4, 2 and 1 apart, in this order.
#[inline(always)]
pub fn sum_scattered<const N: usize>(mut values: [f32; N], lane: u32) -> f32 {
    // Constant halves: the compiler must see every index to keep the values in registers.
    macro_rules! halve {
        ($($half:literal),*) => {$(
            if $half < N {
                let mask = (WARP_LANES as usize * $half / N) as u32;
                let is_upper = lane & mask != 0;
                for idx in 0..$half {
                    let (low, high) = (values[idx % N], values[(idx + $half) % N]);
                    let (kept, sent) = if is_upper { (high, low) } else { (low, high) };
                    values[idx % N] = kept + exchange(sent, mask);
                }
            }
        )*};
    }
    halve!(16, 8, 4, 2, 1);
    let mut value = values[0];
    let mut mask = WARP_LANES / N as u32 / 2;
    while mask > 0 {
        value += exchange(value, mask);
        mask /= 2;
    }
    value
}
