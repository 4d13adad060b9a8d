//! What to do now, within an hour, and overnight.

use serde::Serialize;

use super::choice::Choice;

const HOUR: f64 = 3600.0;
/// Ten hours.
const NIGHT: f64 = 10.0 * HOUR;

/// A difference in KL, in nats per token, that nobody notices: below it a model is hard to tell from its original (docs/guide.md,
/// "Reading KL").
const UNNOTICED: f64 = 0.01;

/// What to do in so much time.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// `now`, `within an hour`, `overnight`, or `within` what was asked for.
    pub when: String,
    /// Seconds; `None` for the quickest there is.
    pub limit: Option<f64>,
    /// The method; `None` if nothing fits.
    pub choice: Option<Choice>,
    /// The row above that says the same.
    pub same_as: Option<usize>,
    /// Why it is this one, or why there is none.
    pub why: String,
}

/// The rows for `candidates`, of which those with an obstacle are out of the question. `most` ends the rows: the time that may be used,
/// seconds.
pub(super) fn rows(candidates: Vec<Choice>, most: Option<f64>) -> Vec<Row> {
    let mut limits = vec![("now".to_owned(), None)];
    let usual = [("within an hour", HOUR), ("overnight", NIGHT)];
    let within = |most: f64| (format!("within {}", crate::numbers::duration(most)), Some(most));
    limits.extend(
        usual
            .into_iter()
            .filter(|(_, limit)| most.is_none_or(|most| *limit < most))
            .map(|(name, limit)| (name.to_owned(), Some(limit))),
    );
    limits.extend(most.map(within));
    let mut rows: Vec<Row> = Vec::new();
    for (when, limit) in limits {
        let row = row(&candidates, when, limit, &rows);
        rows.push(row);
    }
    rows
}

fn seconds(choice: &Choice) -> f64 {
    choice.forecast.as_ref().map_or(f64::INFINITY, |needs| needs.seconds)
}

/// What is expected, to be ranked by; methods of which nothing was measured come last.
fn loss(choice: &Choice) -> f64 {
    choice.expected_kl.map_or(f64::INFINITY, |kl| kl.middle())
}

fn is_same(one: &Choice, other: &Choice) -> bool {
    (&one.method, one.windows) == (&other.method, other.windows)
}

fn row(candidates: &[Choice], when: String, limit: Option<f64>, above: &[Row]) -> Row {
    let possible = || candidates.iter().filter(|one| one.obstacle.is_none() && one.forecast.is_some());
    let quickest = possible().min_by(|one, other| seconds(one).total_cmp(&seconds(other)));
    let Some(quickest) = quickest else {
        let obstacle = candidates.iter().find_map(|one| one.obstacle.clone()).unwrap_or_default();
        return Row { when, limit, choice: None, same_as: None, why: format!("nothing fits: {obstacle}") };
    };
    let Some(limit) = limit else {
        let why = "the quickest that fits".to_owned();
        return Row { when, limit, choice: Some(quickest.clone()), same_as: None, why };
    };
    // Of methods that lose the same, the quicker; of windows, the more.
    let fits = possible().filter(|one| seconds(one) <= limit);
    let best = fits.min_by(|one, other| {
        let time = || {
            if one.method == other.method {
                seconds(other).total_cmp(&seconds(one))
            } else {
                seconds(one).total_cmp(&seconds(other))
            }
        };
        loss(one).total_cmp(&loss(other)).then_with(time)
    });
    let Some(best) = best else {
        let needs = crate::numbers::duration(seconds(quickest));
        let why = format!("nothing is ready by then: {} needs {needs}", quickest.method);
        return Row { when, limit: Some(limit), choice: None, same_as: None, why };
    };
    let gain = loss(quickest) - loss(best);
    let enough = gain < UNNOTICED && seconds(quickest) <= limit;
    let (choice, why) = if enough && !is_same(best, quickest) {
        (quickest, "what takes longer is not noticeably closer to the original".to_owned())
    } else {
        (best, slower(candidates, best))
    };
    let same_as =
        above.iter().position(|row| row.choice.as_ref().is_some_and(|above| is_same(above, choice)));
    Row { when, limit: Some(limit), choice: Some(choice.clone()), same_as, why }
}

/// Why nothing better than `best` is taken.
fn slower(candidates: &[Choice], best: &Choice) -> String {
    let better = candidates.iter().filter(|one| loss(one) < loss(best));
    let next = better.min_by(|one, other| seconds(one).total_cmp(&seconds(other)));
    match next {
        None => "nothing is expected to be closer to the original".to_owned(),
        Some(Choice { method, obstacle: Some(obstacle), .. }) => {
            format!("the closest to the original that fits; {method} is closer but {obstacle}")
        }
        Some(next) => {
            let needs = crate::numbers::duration(seconds(next));
            format!("the closest to the original by then; {} is closer but needs {needs}", next.method)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Forecast;
    use super::super::curves::Expected;
    use super::*;

    fn choice(method: &str, seconds: f64, kl: f64, obstacle: Option<&str>) -> Choice {
        let forecast = Forecast {
            bits_per_weight: 4.5,
            bytes: 1,
            peak_memory: 1,
            seconds,
            operations: 0.0,
            low_memory: false,
            parts: Vec::new(),
            memory: crate::session::QuantizeMemory::default(),
            sensitivities_memory: None,
            dwq_memory: None,
            card_memory: None,
        };
        Choice {
            method: method.to_owned(),
            expected_kl: Some(Expected { low: kl, high: kl }),
            recipe: crate::Recipe::of(crate::methods::Method::Rtn),
            bits: 4,
            target_bpw: None,
            windows: None,
            forecast: Some(forecast),
            memory_at_most: Some(1),
            obstacle: obstacle.map(str::to_owned),
            mlx_lm: None,
        }
    }

    fn told(rows: &[Row]) -> Vec<(&str, &str)> {
        let method = |row: &Row| row.choice.as_ref().map(|choice| choice.method.clone());
        rows.iter().map(|row| (row.when.as_str(), method(row).unwrap_or_default().leak() as &str)).collect()
    }

    #[test]
    fn more_time_is_closer() {
        let all = || {
            vec![
                choice("basic", 60.0, 0.2, None),
                choice("gptq", 3000.0, 0.08, None),
                choice("dynamic", 9000.0, 0.07, None),
                choice("stack", 90_000.0, 0.06, None),
            ]
        };
        let made = rows(all(), None);
        assert_eq!(told(&made), [("now", "basic"), ("within an hour", "gptq"), ("overnight", "dynamic")]);
        assert!(made[1].why.contains("dynamic is closer but needs 2 h 30 min"), "{}", made[1].why);
        assert!(made[2].why.contains("stack is closer but needs 1 d 1 h"), "{}", made[2].why);
        // A time of one's own ends the rows.
        let made = rows(all(), Some(7200.0));
        assert_eq!(told(&made), [("now", "basic"), ("within an hour", "gptq"), ("within 2 h", "gptq")]);
        assert_eq!(made[2].same_as, Some(1));
        assert_eq!(told(&rows(all(), Some(600.0))), [("now", "basic"), ("within 10 min", "basic")]);
    }

    /// At 8 bits nobody waits for what nobody notices.
    #[test]
    fn a_gain_that_nobody_notices_is_not_waited_for() {
        let made = rows(vec![choice("basic", 60.0, 0.002, None), choice("stack", 600.0, 0.001, None)], None);
        assert_eq!(told(&made), [("now", "basic"), ("within an hour", "basic"), ("overnight", "basic")]);
        assert!(made[1].same_as == Some(0) && made[1].why.contains("not noticeably"), "{}", made[1].why);
    }

    #[test]
    fn rows_say_what_does_not_fit() {
        let slow = rows(vec![choice("basic", 9000.0, 0.2, None)], None);
        assert_eq!(told(&slow), [("now", "basic"), ("within an hour", ""), ("overnight", "basic")]);
        assert_eq!(slow[1].why, "nothing is ready by then: basic needs 2 h 30 min");
        let none = rows(vec![choice("basic", 1.0, 0.2, Some("needs up to 9 GB of memory"))], None);
        assert!(none.iter().all(|row| row.choice.is_none() && row.why.contains("up to 9 GB")));
        let memory =
            vec![choice("basic", 1.0, 0.2, None), choice("gptq", 9.0, 0.1, Some("needs up to 9 GB"))];
        assert!(rows(memory, None)[1].why.ends_with("gptq is closer but needs up to 9 GB"));
    }

    /// Fewer windows only where more are too slow.
    #[test]
    fn windows_are_spared_last() {
        let fewer = |seconds| Choice { windows: Some(32), ..choice("gptq", seconds, 0.08, None) };
        let of = |usual, fewer_seconds| {
            let all = vec![
                choice("basic", 1.0, 0.2, None),
                choice("gptq", usual, 0.08, None),
                fewer(fewer_seconds),
            ];
            rows(all, None)[1].choice.as_ref().and_then(|choice| choice.windows)
        };
        assert_eq!(of(2000.0, 500.0), None);
        assert_eq!(of(8000.0, 2000.0), Some(32));
    }
}
