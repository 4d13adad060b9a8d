//! Sums, and what is in the way.

use mlx_quant_engine::Capacity;

use super::CardMemory;
use super::on_card::buffer;

#[test]
fn what_is_in_the_way_is_said_with_both_figures() {
    let needs =
        CardMemory { part: "dwq", peak: 9_000_000_000, largest: 2_000_000_000, ..CardMemory::default() };
    let card = |memory, largest| Capacity { memory, largest };
    assert_eq!(needs.obstacle(card(Some(9_000_000_000), 2_000_000_000)), None);
    // What a driver does not tell is in nobody's way.
    assert_eq!(needs.obstacle(card(None, 4_000_000_000)), None);
    let small = needs.obstacle(card(Some(8_000_000_000), 4_000_000_000)).unwrap();
    assert!(small.contains("dwq needs up to 9.00 GB") && small.contains("it has 8.00 GB"), "{small}");
    let narrow = needs.obstacle(card(None, 1_000_000_000)).unwrap();
    assert!(narrow.contains("2.00 GB") && narrow.contains("1.00 GB"), "{narrow}");
}

#[test]
fn buffers_are_as_large_as_a_card_makes_them() {
    // `engine/src/gpu/pool.rs`: sixteenths of the next power of two.
    for (bytes, size) in [(6_356_992, 6_815_744), (1 << 20, 1 << 20), ((1 << 20) + 1, 1_179_648), (100, 256)]
    {
        assert_eq!(buffer(bytes), size);
    }
}

#[test]
fn the_larger_sum_counts_with_the_largest_tensor_of_both() {
    let one =
        CardMemory { part: "a", weights: 100, scratch: 50, largest: 7, ..CardMemory::default() }.summed();
    let other = CardMemory { part: "b", hessians: 100, largest: 90, ..CardMemory::default() }.summed();
    assert_eq!((one.peak, one.max(other).part, other.max(one).largest), (157, "a", 90));
}
