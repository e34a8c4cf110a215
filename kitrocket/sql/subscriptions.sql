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

-- name: users_of_customer
-- The users whom the mirror or their row links to a customer, two at most. $1 customer.
SELECT user_id FROM kitrocket.dodo_subscriptions WHERE customer_id = $1 AND user_id IS NOT NULL
UNION
SELECT user_id FROM subscriptions WHERE dodo_customer_id = $1
LIMIT 2;

-- name: users_by_verified_email
-- The users with an address that was verified, two at most. $1 e-mail address in lower case.
SELECT id AS user_id FROM users WHERE lower(email) = $1 AND email_verified IS NOT NULL LIMIT 2;

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

-- name: payments_unknown
-- Payments of which only refunds or disputes are known.
SELECT payment_id FROM kitrocket.dodo_payments WHERE status IS NULL ORDER BY payment_id;

-- name: snapshots_due
-- Subscriptions whose meaning time alone has changed, the longest due first. $1 now.
SELECT subscription_id FROM kitrocket.dodo_subscriptions WHERE reproject_at <= $1 ORDER BY reproject_at LIMIT 1000;

-- name: write_snapshot
-- Puts a snapshot into the mirror. $1 to $30 in the order of the columns.
INSERT INTO kitrocket.dodo_subscriptions (
    subscription_id, user_id, customer_id, product_id, plan, status, created_at, previous_billing_date,
    next_billing_date, cancel_at_next_billing_date, cancelled_at, expires_at, paused_at, past_due_ends_at,
    trial_period_days, pending_plan, pending_plan_at, started, event_at, event_key, webhook_id, fetched_at, needs_check,
    reproject_at, revoked_at, revoked_reason, dispute_open, charged, charge_failed, named_key, version
)
VALUES (
    $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24, $25,
    $26, $27, $28, $29, $30, 1
)
ON CONFLICT (subscription_id) DO UPDATE SET
    user_id = excluded.user_id,
    customer_id = excluded.customer_id,
    product_id = excluded.product_id,
    plan = excluded.plan,
    status = excluded.status,
    created_at = excluded.created_at,
    previous_billing_date = excluded.previous_billing_date,
    next_billing_date = excluded.next_billing_date,
    cancel_at_next_billing_date = excluded.cancel_at_next_billing_date,
    cancelled_at = excluded.cancelled_at,
    expires_at = excluded.expires_at,
    paused_at = excluded.paused_at,
    past_due_ends_at = excluded.past_due_ends_at,
    trial_period_days = excluded.trial_period_days,
    pending_plan = excluded.pending_plan,
    pending_plan_at = excluded.pending_plan_at,
    started = excluded.started,
    event_at = excluded.event_at,
    event_key = excluded.event_key,
    webhook_id = excluded.webhook_id,
    fetched_at = excluded.fetched_at,
    needs_check = excluded.needs_check,
    reproject_at = excluded.reproject_at,
    revoked_at = excluded.revoked_at,
    revoked_reason = excluded.revoked_reason,
    dispute_open = excluded.dispute_open,
    charged = excluded.charged,
    charge_failed = excluded.charge_failed,
    named_key = excluded.named_key,
    version = kitrocket.dodo_subscriptions.version + 1
RETURNING subscription_id;

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

-- name: holdings
-- What users have: each snapshot beside each row, the row that counts first (live, then one that the mirror knows, then
-- the newest), and the incidents that are open about them. The ORDER BY stands in users.sql too, and must stay the same.
-- $1 users.
SELECT
    u.id AS owner_id, m.*, r.id AS row_id, r.plan AS row_plan, r.status AS row_status,
    r.dodo_customer_id AS row_dodo_customer_id, r.dodo_subscription_id AS row_dodo_subscription_id,
    r.current_period_end AS row_current_period_end, r.created_at AS row_created_at, r.updated_at AS row_updated_at,
    k.subscription_id IS NOT NULL AS row_known,
    ARRAY(
        SELECT i.kind || ' ' || i.subject FROM kitrocket.billing_incidents i
        WHERE i.user_id = u.id AND i.closed_at IS NULL AND i.kind IN ('double_billing', 'still_billing')
    ) AS incidents
FROM unnest($1::text[]) AS u (id)
LEFT JOIN kitrocket.dodo_subscriptions m ON m.user_id = u.id
LEFT JOIN subscriptions r ON r.user_id = u.id
LEFT JOIN kitrocket.dodo_subscriptions k ON k.subscription_id = r.dodo_subscription_id
ORDER BY
    u.id, r.status IN ('active', 'trialing', 'past_due') DESC, k.subscription_id IS NOT NULL DESC, r.created_at DESC,
    r.id DESC, m.subscription_id;

-- name: open_incident
-- Opens an incident unless one of its kind and subject is open. $1 id, $2 kind, $3 subject, $4 user, $5 now, $6 detail,
-- $7 whether hooks are told: 'pending' or 'none'.
INSERT INTO kitrocket.billing_incidents (
    id, kind, subject, user_id, opened_at, detail, hook_state, hook_attempts, hook_next_at
)
VALUES ($1, $2, $3, $4, $5::timestamp, $6, $7, 0, CASE WHEN $7 = 'pending' THEN $5::timestamp END)
ON CONFLICT (kind, subject) WHERE closed_at IS NULL DO NOTHING
RETURNING id;

-- name: close_incident
-- Closes the open incident of a kind and subject. $1 kind, $2 subject, $3 now.
UPDATE kitrocket.billing_incidents SET closed_at = $3 WHERE kind = $1 AND subject = $2 AND closed_at IS NULL
RETURNING id;

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

-- name: insert_row
-- A new row. $1 id, $2 user, $3 plan, $4 status, $5 customer, $6 subscription, $7 period's end, $8 created, $9 updated.
INSERT INTO subscriptions (
    id, user_id, plan, status, dodo_customer_id, dodo_subscription_id, current_period_end, created_at, updated_at
)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
RETURNING id;

-- name: update_row
-- What a row shows. $1 id, $2 user, $3 plan, $4 status, $5 customer, $6 subscription, $7 period's end, $8 created,
-- $9 updated.
UPDATE subscriptions
SET
    plan = $3, status = $4, dodo_customer_id = $5, dodo_subscription_id = $6, current_period_end = $7, created_at = $8,
    updated_at = $9
WHERE id = $1 AND user_id = $2
RETURNING id;

-- name: delete_row
-- A row whose subscription now belongs to somebody else. $1 id, $2 user.
DELETE FROM subscriptions WHERE id = $1 AND user_id = $2 RETURNING id;

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
