//! Gram matrices, their factors, and rounding by them.

use mlx_format::{FloatType, Mode, PackedMut, PackedRef, Scheme};
use mlx_quant_engine::rounding::{How, Rounded};
use mlx_quant_engine::{Device, Factor, Gram, GramSum, Tensor, cpu, plain};

use super::{bits, distance, engines, numbers, on, values};

/// Of seeded inputs, and these.
pub(super) fn gram(device: &Device, size: usize, windows: usize, tokens: usize) -> (Gram, Vec<f32>) {
    let inputs = numbers(windows * tokens * size, 7);
    let mut sum = GramSum::new(size, device).unwrap();
    for window in inputs.chunks_exact(tokens * size) {
        sum.add(&Tensor::from_slice(window, (1, tokens, size), device).unwrap()).unwrap();
    }
    (sum.finish().unwrap(), inputs)
}

pub(super) fn factor(gram: &Gram, order: Vec<usize>) -> Factor {
    Factor::new(gram, order, 0.01).unwrap().unwrap()
}

#[test]
fn sums_products_of_all_tokens() {
    for device in engines().into_iter().chain([plain()]) {
        let (size, windows, tokens) = (200, 3, 17);
        let (gram, inputs) = gram(&device, size, windows, tokens);
        assert_eq!(gram.tokens, 51);
        let found = values(&gram.values);
        for (row, column) in [(0, 0), (5, 199), (199, 5), (193, 20), (100, 101)] {
            let tokens = inputs.chunks_exact(size);
            let expected: f64 = tokens.map(|x| (x[row] * x[column]) as f64).sum::<f64>() / 51.0;
            let found = found[row * size + column] as f64;
            assert!((found - expected).abs() < 1e-5, "{row} {column}: {found} {expected}");
        }
        let diagonal: Vec<f32> = (0..size).map(|at| found[at * size + at]).collect();
        assert_eq!(gram.diagonal().unwrap(), diagonal);
    }
}

/// Rows that are summed alone and put into their places are those of the whole: on a card bit for bit.
#[test]
fn rows_are_summed_alone() {
    for device in engines().into_iter().chain([plain()]) {
        for (size, tokens, ends) in [(200, 17, [64, 70, 199, 200]), (600, 90, [128, 256, 596, 600])] {
            let (whole, inputs) = gram(&device, size, 3, tokens);
            let mut parts = Gram::empty(size, &device).unwrap();
            let held = parts.clone();
            let mut first = 0;
            for end in ends {
                let mut sum = GramSum::of_rows(size, first..end, &device).unwrap();
                assert_eq!(sum.clone().finish().is_err(), first > 0 || end < size);
                for window in inputs.chunks_exact(tokens * size) {
                    sum.add(&Tensor::from_slice(window, (1, tokens, size), &device).unwrap()).unwrap();
                }
                sum.place(&mut parts).unwrap();
                first = end;
            }
            let what = format!("{size} on {}", device.name());
            assert_eq!(parts.tokens, whole.tokens, "{what}");
            assert!(distance(&parts.values, &whole.values) < 1e-5, "{what}");
            assert!(!device.is_card() || bits(&parts.values) == bits(&whole.values), "{what}");
            assert!(values(&held.values).iter().all(|value| *value == 0.0), "{what}");
        }
        let rows = GramSum::of_rows(3, 1..2, &device).unwrap();
        assert!(rows.place(&mut Gram::empty(4, &device).unwrap()).is_err());
        assert!(GramSum::of_rows(3, 1..4, &device).is_err());
    }
}

/// A sum in the making changes nobody else's numbers.
#[test]
fn sums_are_of_their_own() {
    for device in engines().into_iter().chain([plain()]) {
        let x = Tensor::from_vec(numbers(6, 1), (2, 3), &device).unwrap();
        let mut first = GramSum::new(3, &device).unwrap();
        first.add(&x).unwrap();
        let mut second = first.clone();
        second.add(&x).unwrap();
        second.merge(&first).unwrap();
        let (first, second) = (first.finish().unwrap(), second.finish().unwrap());
        assert_eq!((first.tokens, second.tokens), (2, 6));
        assert!(distance(&first.values, &second.values) < 1e-6, "three times the same tokens");
        assert!(first.loss(&x.t().unwrap()).is_err());
        assert!(GramSum::new(4, &device).unwrap().add(&x).is_err());
    }
}

/// Everything that is derived of a matrix, against `plain`.
#[test]
fn engines_agree_on_what_follows() {
    for size in [1, 2, 33, 96, 200] {
        let (reference, _) = gram(&plain(), size, 4, 100);
        let factors: Vec<f32> = (0..size).map(|at| [0.5, 1.0, 4.0, 0.3][at % 4]).collect();
        let order: Vec<usize> = (0..size).rev().collect();
        let changes = Tensor::from_vec(numbers(3 * size, 9), (3, size), &plain()).unwrap();
        for device in engines() {
            let own = gram(&device, size, 4, 100).0;
            assert!(distance(&own.values, &reference.values) < 1e-5);
            let scaled = [&own, &reference].map(|gram| gram.scaled(&factors).unwrap().values);
            assert!(distance(&scaled[0], &scaled[1]) < 1e-5);
            let losses = [own.loss(&on(&device, &changes)), reference.loss(&changes)].map(Result::unwrap);
            assert!((losses[0] - losses[1]).abs() < 1e-4 * losses[1], "{losses:?}");
            let [own, reference] = [&own, &reference].map(|gram| factor(gram, order.clone()));
            assert_eq!(own.damping, reference.damping);
            assert!(distance(&own.hessian, &reference.hessian) < 1e-5);
            assert!(
                distance(&own.upper, &reference.upper) < 1e-3,
                "{}",
                distance(&own.upper, &reference.upper)
            );
        }
    }
}

#[test]
fn threads_decide_nothing() {
    for device in engines() {
        let of = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let gram = gram(&device, 600, 4, 300).0;
                (values(&gram.values), values(&factor(&gram, (0..600).collect()).upper))
            })
        };
        let first = of(1);
        assert!(first == of(2) && first == of(5));
    }
}

#[test]
fn factors_the_inverse() {
    for device in engines().into_iter().chain([plain()]) {
        let size = 96;
        let gram = gram(&device, size, 4, 100).0;
        let factor = factor(&gram, (0..size).rev().collect());
        let (upper, hessian) = (values(&factor.upper), values(&factor.hessian));
        // U^T U H = 1
        let at = |m: &[f32], r: usize, c: usize| m[r * size + c] as f64;
        for row in [0, 1, 50, 95] {
            let inverse: Vec<f64> =
                (0..size).map(|c| (0..size).map(|k| at(&upper, k, row) * at(&upper, k, c)).sum()).collect();
            for column in 0..size {
                let one: f64 = (0..size).map(|k| inverse[k] * at(&hessian, k, column)).sum();
                let expected = f64::from(u8::from(row == column));
                assert!((one - expected).abs() < 1e-3, "{row} {column} {one}");
            }
        }
    }
}

#[test]
fn dead_columns_and_few_tokens_are_no_failure() {
    for device in engines().into_iter().chain([plain()]) {
        let gram = gram(&device, 64, 1, 5).0;
        let mut numbers = values(&gram.values);
        for at in 0..64 {
            numbers[at * 64 + 3] = 0.0;
            numbers[3 * 64 + at] = 0.0;
        }
        let with = |numbers: Vec<f32>| {
            let values = Tensor::from_vec(numbers, (64, 64), &device).unwrap();
            Gram { values, ..gram.clone() }
        };
        let upper = values(&factor(&with(numbers), (0..64).collect()).upper);
        assert!(upper[3 * 64 + 4..4 * 64].iter().all(|value| *value == 0.0));
        assert!(Factor::new(&with(vec![0.0; 64 * 64]), (0..64).collect(), 0.01).unwrap().is_none());
        assert!(Factor::new(&with(vec![f32::NAN; 64 * 64]), (0..64).collect(), 0.01).unwrap().is_none());
    }
}

/// Positive definite but for one pair of features, which may lie in any block.
#[test]
fn what_is_not_positive_definite_has_no_factor() {
    for device in engines().into_iter().chain([plain()]) {
        for (size, bad) in [(2, 0), (70, 0), (70, 67), (150, 100)] {
            let one = |at: usize| match (at / size, at % size) {
                (row, column) if row == column => 1.0,
                (row, column) if row.min(column) == bad && row.max(column) == bad + 1 => 2.0,
                _ => 0.0,
            };
            let of = |one: &dyn Fn(usize) -> f32| {
                Tensor::from_vec((0..size * size).map(one).collect(), (size, size), &device).unwrap()
            };
            let what = format!("{size}, {bad} on {}", device.name());
            let mut hessian = of(&one);
            let held = hessian.clone();
            assert!(device.factor(&mut hessian, 0.5).unwrap().is_none(), "{what}");
            assert_eq!(values(&hessian), values(&held), "{what}");
            let upper = device.factor(&mut hessian, 3.0).unwrap().unwrap();
            assert_eq!(values(&upper)[size * size - 1], 0.5, "{what}");
            // Of the matrix alone that was given, and of its diagonal.
            let damped = |at: usize| one(at) + if at.is_multiple_of(size + 1) { 3.0 } else { 0.0 };
            assert_eq!(values(&held), values(&of(&one)), "{what}");
            assert_eq!(values(&hessian), values(&of(&damped)), "{what}");
        }
    }
}

#[test]
fn loss_is_the_error_of_outputs() {
    for device in engines().into_iter().chain([plain()]) {
        let (size, windows, tokens) = (70, 2, 30);
        let (gram, inputs) = gram(&device, size, windows, tokens);
        let changes = numbers(3 * size, 9);
        let mut expected = 0.0;
        for x in inputs.chunks_exact(size) {
            for row in changes.chunks_exact(size) {
                expected += row.iter().zip(x).map(|(w, x)| (w * x) as f64).sum::<f64>().powi(2);
            }
        }
        let expected = expected / 60.0;
        let found = gram.loss(&Tensor::from_vec(changes, (3, size), &device).unwrap()).unwrap();
        assert!((found - expected).abs() < 1e-4 * expected);
    }
}

/// An engine's rounding is the processor's, with the engine's own factor.
#[test]
fn rounding_gives_what_it_says_it_decodes_to() {
    let scheme = Scheme::affine(3, 32).unwrap();
    let weight = Tensor::from_vec(numbers(70 * 96, 2), (70, 96), &cpu()).unwrap();
    for device in engines().into_iter().chain([plain()]) {
        let gram = gram(&device, 96, 4, 100).0;
        let factor = factor(&gram, (0..96).collect());
        let how = How::Compensated { factor: &factor, block_size: 32, sweeps: 1 };
        let (rounded, decoded) = device.round(&on(&device, &weight), scheme, FloatType::Bf16, how).unwrap();
        let rounded = rounded.fetch().unwrap();
        assert_eq!(values(&decoded), rounded.decoded());
        assert_eq!((rounded.rows(), decoded.dims()), (70, &[70, 96][..]));
        let loss = |decoded: &Tensor| gram.loss(&(decoded - on(&device, &weight)).unwrap()).unwrap();
        let diagonal = gram.diagonal().unwrap();
        let nearest = How::Nearest { weights: &diagonal };
        let nearest = device.round(&on(&device, &weight), scheme, FloatType::Bf16, nearest).unwrap().1;
        assert!(loss(&decoded) < loss(&nearest));
        assert!(
            device.round(&on(&device, &weight).t().unwrap(), scheme, FloatType::Bf16, How::Plain).is_err()
        );
    }
}

/// Every way of rounding.
fn ways<'f>(factor: &'f Factor, weights: &'f [f32], block_size: usize) -> [How<'f>; 8] {
    [
        How::Plain,
        How::Blind { weights },
        How::Careful { weights, blind: true },
        How::Careful { weights, blind: false },
        How::Nearest { weights },
        How::Refined { factor, block_size, sweeps: 2 },
        How::Compensated { factor, block_size, sweeps: 0 },
        How::Compensated { factor, block_size, sweeps: 2 },
    ]
}

/// Whatever an engine rounds with kernels of its own is as good as what the processor rounds, at every width, group
/// size and dtype, in any order of columns, and decodes as a file does.
#[test]
fn rounding_is_as_good_as_the_processors() {
    let (rows, columns) = (70, 256);
    let weight = Tensor::from_vec(numbers(rows * columns, 2), (rows, columns), &cpu()).unwrap();
    let (here, _) = gram(&cpu(), columns, 4, 100);
    let diagonal = here.diagonal().unwrap();
    for device in engines() {
        let (own, _) = gram(&device, columns, 4, 100);
        for (bits, group, float, block_size) in [
            (2, 64, FloatType::Bf16, 128),
            (3, 32, FloatType::F16, 96),
            (4, 64, FloatType::F32, 64),
            (4, 128, FloatType::Bf16, 1),
            (5, 128, FloatType::F16, 4096),
            (8, 32, FloatType::Bf16, 128),
        ] {
            let scheme = Scheme::affine(bits, group).unwrap();
            let groups = columns / group;
            let turned = |at: usize| (groups - 1 - at / group) * group + at % group;
            let order: Vec<usize> = (0..columns).map(turned).collect();
            let factors = [factor(&own, order.clone()), factor(&here, order)];
            let [own, theirs] = factors.each_ref().map(|factor| ways(factor, &diagonal, block_size));
            for (way, (own, theirs)) in own.into_iter().zip(theirs).enumerate() {
                let (rounded, decoded) = device.round(&on(&device, &weight), scheme, float, own).unwrap();
                let (expected, reference) = cpu().round(&weight, scheme, float, theirs).unwrap();
                let [rounded, expected] = [rounded, expected].map(|pending| pending.fetch().unwrap());
                let what =
                    format!("way {way}, {bits} bits, groups of {group}, {float:?} on {}", device.name());
                assert_eq!(values(&decoded), rounded.decoded(), "{what}");
                assert!(rounded.codes.iter().all(|code| u32::from(*code) < 1 << bits), "{what}");
                let numbers = rounded.scales.iter().chain(&rounded.biases);
                assert!(numbers.clone().all(|number| *number == float.round(*number)), "{what}");
                assert_eq!(numbers.count(), 2 * rows * groups, "{what}");
                let loss = |decoded: Vec<f32>| {
                    let decoded = Tensor::from_vec(decoded, (rows, columns), &cpu()).unwrap();
                    here.loss(&(decoded - &weight).unwrap()).unwrap()
                };
                let [found, best] = [values(&decoded), values(&reference)].map(loss);
                // The first five decide for each weight alone; later ones go on from what others became.
                let apart = if way < 5 { 2e-3 } else { 5e-3 };
                assert!((found / best - 1.0).abs() < apart, "{what}: {found} where the processor has {best}");
                if way < 5 {
                    let same = rounded.codes.iter().zip(&expected.codes).filter(|(a, b)| a == b).count();
                    assert!(same * 1000 > 995 * rows * columns, "{what}: {same} codes alike");
                }
            }
        }
    }
}

/// A careful grid loses no more than plain rounding's in any group, and holds zero where that does; a full search's does not.
#[test]
fn a_careful_search_keeps_zero() {
    let (rows, columns) = (70, 256);
    let numbers: Vec<f32> =
        numbers(rows * columns, 2).iter().map(|value| FloatType::Bf16.round(*value)).collect();
    let weight = Tensor::from_vec(numbers.clone(), (rows, columns), &cpu()).unwrap();
    let weights = vec![1.0; columns];
    for device in engines().into_iter().chain([plain()]) {
        for bits in [2, 3, 4] {
            let scheme = Scheme::affine(bits, 64).unwrap();
            let what = format!("{bits} bits on {}", device.name());
            let by = |how| {
                let (rounded, _) = device.round(&on(&device, &weight), scheme, FloatType::Bf16, how).unwrap();
                rounded.fetch().unwrap()
            };
            let losses = |rounded: &Rounded| -> Vec<f32> {
                let decoded = rounded.decoded();
                let squares: Vec<f32> =
                    numbers.iter().zip(&decoded).map(|(a, b)| (a - b) * (a - b)).collect();
                squares.chunks(64).map(|group| group.iter().sum()).collect()
            };
            // Up to the rounding of the scale to bfloat16.
            let holds = |rounded: &Rounded| {
                rounded.scales.iter().zip(&rounded.biases).all(|(scale, bias)| {
                    let code = (-bias / scale).round();
                    (code * scale + bias).abs() <= bias.abs() / 128.0
                })
            };
            let nearest = by(How::Plain);
            let careful = by(How::Careful { weights: &weights, blind: false });
            let full = by(How::Nearest { weights: &weights });
            let [before, after, best] = [&nearest, &careful, &full].map(losses);
            assert!(before.iter().zip(&after).all(|(before, after)| *after <= before * 1.001), "{what}");
            let sums = [&before, &after, &best].map(|all| all.iter().sum::<f32>());
            assert!(sums.is_sorted_by(|a, b| a > b), "{what}: {sums:?}");
            assert!(holds(&nearest) && holds(&careful) && !holds(&full), "{what}");
        }
    }
}

/// The fp modes: every engine gives scales that are stored bytes and codes that decode to what it says, the more is done
/// the nearer, in any order of columns; plain rounding has the bytes of `mx.quantize`.
#[test]
fn rounding_to_fp_modes_decodes_as_files_do() {
    let (rows, columns) = (70, 256);
    // A tenth: scales of nvfp4 lie where e4m3 has all of its steps.
    let small: Vec<f32> = numbers(rows * columns, 2).iter().map(|value| value * 0.7).collect();
    let weight = Tensor::from_vec(small, (rows, columns), &cpu()).unwrap();
    for device in engines().into_iter().chain([plain()]) {
        let own = gram(&device, columns, 4, 100).0;
        let diagonal = own.diagonal().unwrap();
        for mode in [Mode::Mxfp4, Mode::Mxfp8, Mode::Nvfp4] {
            let scheme = Scheme::new(mode, None, None).unwrap();
            let group = scheme.group_size();
            let turned = |at: usize| (columns / group - 1 - at / group) * group + at % group;
            let factor = factor(&own, (0..columns).map(turned).collect());
            let loss_of = |how| {
                let given = on(&device, &weight);
                let (rounded, decoded) = device.round(&given, scheme, FloatType::Bf16, how).unwrap();
                let rounded = rounded.fetch().unwrap();
                let what = format!("{scheme} on {}", device.name());
                let file = file(&rounded);
                assert_eq!(values(&decoded), file, "{what}");
                assert_eq!(rounded.decoded(), file, "{what}");
                assert!(rounded.biases.is_empty() && rounded.scales.len() == rows * columns / group);
                own.loss(&(decoded - given).unwrap()).unwrap()
            };
            let [plain, _, _, _, nearest, refined, compensated, swept] =
                ways(&factor, &diagonal, 100).map(loss_of);
            let what = format!("{scheme} on {}", device.name());
            let losses = [plain, nearest, compensated, swept];
            assert!(losses.is_sorted_by(|a, b| a > b), "{what}: {losses:?}");
            assert!(refined < nearest, "{what}: {refined} after {nearest}");
            let given = on(&device, &weight);
            let (rounded, _) = device.round(&given, scheme, FloatType::F32, How::Plain).unwrap();
            let rounded = rounded.fetch().unwrap();
            let (words, scales) = quantized(scheme, &values(&weight), columns);
            assert!(rounded.scale_bytes() == scales && packed(&rounded) == words, "{what}");
        }
    }
}

fn packed(rounded: &Rounded) -> Vec<u8> {
    let rows = rounded.rows();
    let mut words = vec![0u8; rows * rounded.scheme.words(rounded.columns) * 4];
    mlx_format::pack(rounded.scheme, &rounded.codes, &mut words);
    words
}

/// What the stored bytes decode to, by MLX's arithmetic.
fn file(rounded: &Rounded) -> Vec<f32> {
    let (words, scales) = (packed(rounded), rounded.scale_bytes());
    let stored = PackedRef { weight: &words, scales: &scales, biases: &[] };
    let mut bytes = vec![0u8; rounded.codes.len() * 4];
    mlx_format::fp::dequantize_reference(rounded.scheme.mode(), FloatType::F32, stored, &mut bytes);
    let mut values = vec![0f32; rounded.codes.len()];
    FloatType::F32.widen(&bytes, &mut values);
    values
}

/// Words and scales of `mx.quantize`.
fn quantized(scheme: Scheme, values: &[f32], columns: usize) -> (Vec<u8>, Vec<u8>) {
    let rows = values.len() / columns;
    let mut bytes = vec![0u8; values.len() * 4];
    FloatType::F32.narrow(values, &mut bytes);
    let (mut weight, mut scales) =
        (vec![0u8; rows * scheme.words(columns) * 4], vec![0u8; rows * scheme.groups(columns)]);
    let out = PackedMut { weight: &mut weight, scales: &mut scales, biases: &mut [] };
    mlx_format::fp::quantize_reference(scheme.mode(), FloatType::F32, &bytes, out, None);
    (weight, scales)
}

/// Scales of the fp modes are bytes: rows have room for some factors, through which they decode to as much more or less.
#[test]
fn rows_of_fp_modes_have_room_for_powers_of_two() {
    let (rows, columns) = (3, 64);
    let mut numbers = numbers(rows * columns, 2);
    for (at, value) in numbers.iter_mut().enumerate() {
        *value *= [1.0, 1e-2, 300.0][at / columns];
    }
    let weight = Tensor::from_vec(numbers, (rows, columns), &cpu()).unwrap();
    let scheme = Scheme::new(Mode::Nvfp4, None, None).unwrap();
    let how = How::Nearest { weights: &[1.0; 64] };
    for device in engines() {
        let of = || device.round(&on(&device, &weight), scheme, FloatType::Bf16, how).unwrap();
        let before = of().0.fetch().unwrap().decoded();
        let (pending, _) = of();
        let room = pending.room(0).unwrap().to_vec();
        assert!(
            room[0].0 < 0.1 && room[0].1 > 8.0 && room[1].0 > room[0].0 && room[2].1 < room[0].1,
            "{room:?}"
        );
        let parts = pending.split(&[1, 2]);
        assert_eq!((parts[0].room(0).unwrap(), parts[1].room(0).unwrap()), (&room[..1], &room[1..]));
        assert_eq!(of().0.room(1).unwrap(), &room[1..]);
        for last in [false, true] {
            let end = |room: &(f32, f32)| if last { room.1 } else { room.0 };
            let (mut pending, _) = of();
            let factors: Vec<f32> = room.iter().map(end).collect();
            pending.scale_rows(0, &factors[..1]);
            pending.scale_rows(1, &factors[1..]);
            let left = pending.room(0).unwrap();
            assert!(left.iter().map(end).all(|factor| factor == 1.0), "{left:?}");
            let rounded = pending.fetch().unwrap();
            let expected: Vec<f32> =
                before.iter().enumerate().map(|(at, value)| value * factors[at / columns]).collect();
            assert_eq!(file(&rounded), expected);
        }
        let affine = Scheme::affine(4, 32).unwrap();
        let rounded = device.round(&on(&device, &weight), affine, FloatType::Bf16, how).unwrap().0;
        assert!(rounded.room(0).is_none());
    }
}

/// A card takes columns by hundreds: what its blocks do to columns behind them, and sweeps to those in front.
#[test]
fn rounding_of_many_columns_is_as_good_as_the_processors() {
    let (rows, columns) = (24, 1152);
    let weight = Tensor::from_vec(numbers(rows * columns, 2), (rows, columns), &cpu()).unwrap();
    let (here, _) = gram(&cpu(), columns, 4, 400);
    let scheme = Scheme::affine(3, 64).unwrap();
    let theirs = factor(&here, (0..columns).collect());
    let loss = |decoded: Vec<f32>| {
        let decoded = Tensor::from_vec(decoded, (rows, columns), &cpu()).unwrap();
        here.loss(&(decoded - &weight).unwrap()).unwrap()
    };
    for device in engines() {
        let own = factor(&gram(&device, columns, 4, 400).0, (0..columns).collect());
        for sweeps in [0, 2] {
            let how = |factor| How::Compensated { factor, block_size: 128, sweeps };
            let found = device.round(&on(&device, &weight), scheme, FloatType::Bf16, how(&own)).unwrap();
            let best = cpu().round(&weight, scheme, FloatType::Bf16, how(&theirs)).unwrap();
            let [found, best] = [found, best].map(|(_, decoded)| loss(values(&decoded)));
            let what = format!("{sweeps} sweeps on {}: {found} and {best}", device.name());
            assert!((found / best - 1.0).abs() < 0.01, "{what}");
        }
    }
}
