-- name: lock_payment
-- Locks a payment until the end of the transaction and returns it as it is then, if it is known. Classes of locks are
-- taken in ascending order: payment, subscription, user; within a class by ascending hash. $1 payment.
SELECT * FROM kitrocket.lock_payment($1);

-- name: lock_subscriptions
-- Locks subscriptions until the end of the transaction and returns those the mirror knows, as they are then. $1 ids.
SELECT * FROM kitrocket.lock_subscriptions($1::text[]);

-- name: keep_users
-- Locks users' subscription rows until the end of the transaction, keeps the users from being deleted, and returns which
-- of them exist. $1 ids.
SELECT kept AS id FROM kitrocket.keep_users($1::text[]) AS kept;

-- name: user_exists
-- Whether there is a user. $1 user.
SELECT EXISTS (SELECT 1 FROM users WHERE id = $1) AS exists;

-- name: lock_for_snapshot
-- Locks a subscription, then the users it may belong to, and returns what is known of them and of the subscription's
-- payments. $1 subscription, $2 customer, $3 whether the event names a user, $4 the user it names, $5 e-mail address in
-- lower case.
SELECT kitrocket.lock_for_snapshot($1, $2, $3, $4, $5);

-- name: holdings
-- What users have whose locks the transaction holds: snapshots, rows, the row that counts first (live, then one that the
-- mirror knows, then the newest), and the incidents that are open about them. $1 users.
SELECT kitrocket.holdings($1::text[]);

-- name: write_changes
-- Writes what a transaction changes: mirror, rows, incidents and what became of the event. $1 the changes, by the columns
-- of their tables.
SELECT kitrocket.write_changes($1);

-- name: snapshots
-- The mirror's snapshots by their ids, without a lock. $1 ids.
SELECT * FROM kitrocket.dodo_subscriptions WHERE subscription_id = ANY($1::text[]);

-- name: snapshots_before
-- The subscriptions made until an instant, or it is not known when. $1 instant.
SELECT subscription_id, version
FROM kitrocket.dodo_subscriptions
WHERE created_at <= $1 OR created_at IS NULL
ORDER BY subscription_id;

-- name: snapshots_to_check
-- Subscriptions about which the provider should be asked, and was not since an instant. $1 instant, $2 at most.
SELECT subscription_id, version
FROM kitrocket.dodo_subscriptions
WHERE needs_check AND (fetched_at IS NULL OR fetched_at < $1)
ORDER BY subscription_id
LIMIT $2;

-- name: close_drift
-- Closes the incidents of subscriptions that the provider knows after all. $1 subscriptions, $2 now.
UPDATE kitrocket.billing_incidents
SET closed_at = $2
WHERE kind = 'drift' AND closed_at IS NULL AND subject = ANY($1::text[])
RETURNING id;

-- name: payments_unknown
-- Payments of which only refunds or disputes are known.
SELECT payment_id FROM kitrocket.dodo_payments WHERE status IS NULL ORDER BY payment_id;

-- name: snapshots_due
-- Subscriptions whose meaning time alone has changed, the longest due first. $1 now.
SELECT subscription_id FROM kitrocket.dodo_subscriptions WHERE reproject_at <= $1 ORDER BY reproject_at LIMIT 1000;

-- name: payments_of_subscription
-- The payments that name a subscription. $1 subscription.
SELECT * FROM kitrocket.dodo_payments WHERE subscription_ids @> jsonb_build_array($1::text) ORDER BY payment_id;

-- name: write_payment
-- Puts a payment into the index. $1 payment, $2 subscriptions, $3 customer, $4 status, $5 charge type, $6 amount in
-- minor units, $7 currency, $8 service periods, $9 created, $10 event time, $11 refunds, $12 disputes.
INSERT INTO kitrocket.dodo_payments (
    payment_id, subscription_ids, customer_id, status, charge_type, total_amount, currency, service_periods, created_at,
    event_at, refunds, disputes
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
ON CONFLICT (payment_id) DO UPDATE SET
    subscription_ids = excluded.subscription_ids,
    customer_id = excluded.customer_id,
    status = excluded.status,
    charge_type = excluded.charge_type,
    total_amount = excluded.total_amount,
    currency = excluded.currency,
    service_periods = excluded.service_periods,
    created_at = excluded.created_at,
    event_at = excluded.event_at,
    refunds = excluded.refunds,
    disputes = excluded.disputes
RETURNING payment_id;

-- name: row_of_user
-- The row of a user that counts, chosen as above. $1 user.
SELECT s.*
FROM subscriptions s
LEFT JOIN kitrocket.dodo_subscriptions m ON m.subscription_id = s.dodo_subscription_id
WHERE s.user_id = $1
ORDER BY
    s.status IN ('active', 'trialing', 'past_due') DESC, m.subscription_id IS NOT NULL DESC, s.created_at DESC, s.id DESC
LIMIT 1;

-- name: access
-- A user's snapshots, each beside the row of the user that counts; without snapshots the row alone. $1 user.
SELECT m.*, s.plan AS row_plan, s.status AS row_status, s.current_period_end AS row_period_end, s.known AS row_known
FROM (SELECT 1) AS one
LEFT JOIN LATERAL (
    SELECT r.plan, r.status, r.current_period_end, k.subscription_id IS NOT NULL AS known
    FROM subscriptions r
    LEFT JOIN kitrocket.dodo_subscriptions k ON k.subscription_id = r.dodo_subscription_id
    WHERE r.user_id = $1
    ORDER BY
        r.status IN ('active', 'trialing', 'past_due') DESC, k.subscription_id IS NOT NULL DESC, r.created_at DESC,
        r.id DESC
    LIMIT 1
) AS s ON true
LEFT JOIN kitrocket.dodo_subscriptions m ON m.user_id = $1;

-- name: had_trial
-- Whether a subscription of a user ever started that had a trial. $1 user.
SELECT EXISTS (
    SELECT 1 FROM kitrocket.dodo_subscriptions WHERE user_id = $1 AND started AND trial_period_days > 0
) AS had_trial;

-- name: access_of_users
-- The access of users at an instant, a row for each: what kitrocket.dodo.projection decides, said in SQL. Both must say
-- the same. $1 users, $2 now, $3 plans, lowest first, $4 whether an immediate cancellation keeps paid time, $5 grace when
-- the provider gives no deadline, $6 wait for a renewal to be confirmed, $7 whether an open dispute suspends.
WITH wanted AS (
    SELECT DISTINCT id AS user_id FROM unnest($1::text[]) AS id
),
known AS (
    SELECT
        m.*,
        CASE
            WHEN m.status = 'pending' OR (m.status = 'failed' AND NOT m.started) THEN NULL
            WHEN m.revoked_at IS NOT NULL THEN 'revoked'
            WHEN m.status = 'active' AND m.cancel_at_next_billing_date AND m.next_billing_date <= $2 THEN 'ended'
            WHEN m.status IN ('active', 'past_due') AND m.dispute_open AND $7 THEN 'dispute_open'
            WHEN
                m.status = 'active' AND m.trial_period_days > 0 AND NOT m.charged AND $2 < m.next_billing_date
                AND m.previous_billing_date < m.created_at + make_interval(days => least(m.trial_period_days, 366000))
                AND m.next_billing_date
                <= m.previous_billing_date + make_interval(days => least(m.trial_period_days, 366000) + 2)
                THEN 'trial'
            WHEN m.status = 'active' AND m.cancel_at_next_billing_date THEN 'leaving'
            WHEN
                m.status = 'cancelled' AND $4 AND m.paused_at IS NULL AND NOT m.charge_failed
                AND m.next_billing_date > coalesce(m.cancelled_at, m.event_at)
                THEN 'cancelled_paid'
            ELSE m.status
        END AS line
    FROM wanted
    JOIN kitrocket.dodo_subscriptions m USING (user_id)
),
dated AS (
    SELECT
        *,
        CASE
            WHEN line IN ('ended', 'trial', 'leaving', 'cancelled_paid') THEN next_billing_date
            WHEN line = 'past_due' AND past_due_ends_at IS NOT NULL THEN past_due_ends_at
            -- least() would take the other for a date that is NULL.
            WHEN line = 'past_due' AND next_billing_date IS NOT NULL
                THEN least(next_billing_date + $5, '9999-12-31 23:59:59.999999')
            WHEN line = 'active' AND next_billing_date <= $2
                THEN least(next_billing_date + $6, '9999-12-31 23:59:59.999999')
            WHEN line = 'active' THEN next_billing_date
        END AS until
    FROM known
    WHERE line IS NOT NULL
),
judged AS (
    SELECT
        *,
        line IN ('trial', 'leaving')
        OR (line IN ('active', 'past_due', 'cancelled_paid') AND (until IS NULL OR $2 < until)) AS allowed,
        CASE
            WHEN line IN ('trial') THEN 'trialing'
            WHEN line IN ('active', 'leaving') THEN 'active'
            WHEN line IN ('past_due', 'dispute_open', 'on_hold', 'paused') THEN 'past_due'
            ELSE 'cancelled'
        END AS shown
    FROM dated
),
chosen AS (
    SELECT DISTINCT ON (user_id)
        user_id, allowed, plan, shown AS status, until,
        CASE
            WHEN line = 'revoked' THEN coalesce(revoked_reason, 'refunded')
            WHEN line = 'leaving' OR (line = 'trial' AND cancel_at_next_billing_date) THEN 'cancel_scheduled'
            WHEN line = 'past_due' AND allowed THEN 'grace'
            WHEN line = 'active' AND next_billing_date <= $2 AND allowed THEN 'renewal_unconfirmed'
            WHEN line = 'active' AND NOT allowed THEN 'renewal_missing'
            WHEN line = 'cancelled_paid' AND NOT allowed THEN 'ended'
            ELSE line
        END AS reason
    FROM judged
    ORDER BY
        user_id, allowed DESC, shown IN ('active', 'trialing', 'past_due') DESC,
        coalesce(array_position($3::text[], plan), 0) DESC, coalesce(created_at, event_at) DESC,
        subscription_id COLLATE "C" DESC
),
alone AS (
    SELECT
        r.user_id, r.plan, r.status,
        CASE
            WHEN r.status IN ('active', 'trialing') AND r.current_period_end IS NOT NULL
                THEN least(r.current_period_end + $6, '9999-12-31 23:59:59.999999')
            WHEN r.status = 'cancelled' THEN r.current_period_end
        END AS until
    FROM wanted
    CROSS JOIN LATERAL (
        SELECT s.*, k.subscription_id IS NOT NULL AS known
        FROM subscriptions s
        LEFT JOIN kitrocket.dodo_subscriptions k ON k.subscription_id = s.dodo_subscription_id
        WHERE s.user_id = wanted.user_id
        ORDER BY
            s.status IN ('active', 'trialing', 'past_due') DESC, k.subscription_id IS NOT NULL DESC, s.created_at DESC,
            s.id DESC
        LIMIT 1
    ) AS r
    WHERE NOT r.known
)
SELECT
    w.user_id,
    CASE
        WHEN c.allowed OR a.user_id IS NULL THEN coalesce(c.allowed, false)
        WHEN a.status IN ('active', 'trialing') THEN a.until IS NULL OR $2 < a.until
        ELSE coalesce(a.status = 'cancelled' AND $2 < a.until, false)
    END AS allowed,
    CASE WHEN c.allowed OR a.user_id IS NULL THEN c.plan ELSE a.plan END AS plan,
    CASE WHEN c.allowed OR a.user_id IS NULL THEN c.status ELSE a.status END AS status,
    CASE WHEN c.allowed OR a.user_id IS NULL THEN c.until ELSE a.until END AS until,
    CASE
        WHEN NOT coalesce(c.allowed, false) AND a.user_id IS NOT NULL THEN 'row_only'
        WHEN c.user_id IS NOT NULL THEN c.reason
        WHEN EXISTS (SELECT 1 FROM known k WHERE k.user_id = w.user_id) THEN 'not_started'
        ELSE 'none'
    END AS reason
FROM wanted w
LEFT JOIN chosen c USING (user_id)
LEFT JOIN alone a USING (user_id);
