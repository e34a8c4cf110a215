-- name: insert_user
-- A new user. $1 id, $2 e-mail (normalised), $3 name, $4 avatar, $5 now: both created_at and updated_at.
INSERT INTO users (id, email, name, email_verified, avatar, created_at, updated_at)
VALUES ($1, $2, $3, NULL, $4, $5, $5)
RETURNING id, email, name, email_verified, avatar, created_at, updated_at;

-- name: insert_user_if_new
-- A user who signs in for the first time at a provider; no row when another has the address already, also when that
-- one was committed only now. $1 id, $2 e-mail (normalised), $3 name, $4 when the address was verified, or NULL,
-- $5 avatar, $6 now.
INSERT INTO users (id, email, name, email_verified, avatar, created_at, updated_at)
VALUES ($1, $2, $3, $4, $5, $6, $6)
ON CONFLICT DO NOTHING
RETURNING id, email, name, email_verified, avatar, created_at, updated_at;

-- name: insert_credential
-- The account behind e-mail and password; its provider_account_id is the user's id, by which Better Auth finds it.
-- $1 id, $2 user, $3 hash, $4 now.
INSERT INTO accounts (id, user_id, provider, provider_account_id, access_token, refresh_token, expires_at, password, created_at)
VALUES ($1, $2, 'credential', $2, NULL, NULL, NULL, $3, $4);

-- name: user_by_email
-- The user with an e-mail address. $1 the address, normalised.
-- Where another writer left case variants, the one stored in this form comes first, then the oldest.
SELECT id, email, name, email_verified, avatar, created_at, updated_at
FROM users
WHERE lower(email) = $1
ORDER BY email = $1 DESC, created_at, id
LIMIT 1;

-- name: user_with_subscription
-- A user and the subscription row that counts: live first, then one that the mirror knows, then the newest.
-- The ORDER BY stands in subscriptions.sql too, and must stay the same. $1 user.
SELECT
    u.id, u.email, u.name, u.email_verified, u.avatar, u.created_at, u.updated_at,
    chosen.id AS subscription_id, chosen.plan, chosen.status, chosen.dodo_customer_id, chosen.dodo_subscription_id,
    chosen.current_period_end, chosen.created_at AS subscription_created_at,
    chosen.updated_at AS subscription_updated_at
FROM users u
LEFT JOIN LATERAL (
    SELECT s.*
    FROM subscriptions s
    LEFT JOIN kitrocket.dodo_subscriptions m ON m.subscription_id = s.dodo_subscription_id
    WHERE s.user_id = u.id
    ORDER BY
        s.status IN ('active', 'trialing', 'past_due') DESC, m.subscription_id IS NOT NULL DESC, s.created_at DESC, s.id DESC
    LIMIT 1
) chosen ON true
WHERE u.id = $1;

-- name: mark_email_verified
-- Notes when the address was verified; the first time stays. $1 user, $2 now, $3 the address that was verified, or NULL:
-- whichever the user has. Nothing changes when the user has another address by now. One UPDATE, so that it is decided
-- on the locked row.
UPDATE users
SET
    email_verified = CASE
        WHEN email_verified IS NULL AND ($3::text IS NULL OR lower(email) = $3) THEN $2 ELSE email_verified
    END,
    updated_at = CASE
        WHEN email_verified IS NULL AND ($3::text IS NULL OR lower(email) = $3) THEN $2 ELSE updated_at
    END
WHERE id = $1
RETURNING id, email, name, email_verified, avatar, created_at, updated_at;

-- name: verify_email
-- Notes that a token proved an address, once: no row when the user has another by now, or it was verified before.
-- $1 user, $2 the address, $3 now.
UPDATE users SET email_verified = $3, updated_at = $3
WHERE id = $1 AND email = $2 AND email_verified IS NULL
RETURNING id, email, name, email_verified, avatar, created_at, updated_at;

-- name: change_email
-- A new address, not verified yet. $1 user, $2 the address (normalised), $3 now.
UPDATE users SET email = $2, email_verified = NULL, updated_at = $3
WHERE id = $1
RETURNING id, email, name, email_verified, avatar, created_at, updated_at;

-- name: lock_user_to_delete
-- Makes every insert of a row of this user wait, so that the counts hold until the end. $1 user.
SELECT id FROM users WHERE id = $1 FOR UPDATE;

-- name: count_rows_of_user
-- What goes with a user. $1 user.
SELECT
    (SELECT count(*) FROM sessions WHERE user_id = $1) AS sessions,
    (SELECT count(*) FROM accounts WHERE user_id = $1) AS accounts,
    (SELECT count(*) FROM subscriptions WHERE user_id = $1) AS subscriptions,
    (SELECT count(*) FROM usage WHERE user_id = $1) AS usage;

-- name: delete_user
-- A user, and by cascade every row of the user's. $1 user.
DELETE FROM users WHERE id = $1;

-- name: credential_by_email
-- A user with the account that holds the password, if there is one. $1 the address, normalised.
SELECT
    u.id, u.email, u.name, u.email_verified, u.avatar, u.created_at, u.updated_at,
    a.id AS account_id, a.password
FROM users u
LEFT JOIN accounts a ON a.user_id = u.id AND a.provider = 'credential'
WHERE lower(u.email) = $1
ORDER BY
    u.email = $1 DESC, u.created_at, u.id,
    a.provider_account_id = u.id DESC NULLS LAST, a.created_at, a.id
LIMIT 1;

-- name: credential_of_user
-- As credential_by_email, for a user's id. $1 user.
SELECT
    u.id, u.email, u.name, u.email_verified, u.avatar, u.created_at, u.updated_at,
    a.id AS account_id, a.password
FROM users u
LEFT JOIN accounts a ON a.user_id = u.id AND a.provider = 'credential'
WHERE u.id = $1
ORDER BY a.provider_account_id = u.id DESC NULLS LAST, a.created_at, a.id
LIMIT 1;

-- name: replace_hash
-- Puts a new hash in the place of an old one; no row when the password was changed meanwhile.
-- $1 account, $2 the old hash, which may be NULL, $3 the new one.
UPDATE accounts SET password = $3 WHERE id = $1 AND password IS NOT DISTINCT FROM $2::text RETURNING id;

-- name: rows_of_user
-- Every row of a user in the five tables, as JSON without a token or a password, the oldest of a table first. It is one
-- statement, hence one snapshot. Columns are named, so that those another application adds are left out. $1 user.
SELECT part, content
FROM (
    SELECT 'user' AS part, u.created_at AS at, u.id, jsonb_build_object(
        'id', u.id, 'email', u.email, 'name', u.name, 'email_verified', u.email_verified AT TIME ZONE 'UTC',
        'avatar', u.avatar, 'created_at', u.created_at AT TIME ZONE 'UTC', 'updated_at', u.updated_at AT TIME ZONE 'UTC'
    ) AS content
    FROM users u
    WHERE u.id = $1
    UNION ALL
    SELECT 'sessions', s.created_at, s.id, jsonb_build_object(
        'id', s.id, 'user_id', s.user_id, 'expires_at', s.expires_at AT TIME ZONE 'UTC', 'ip_address', s.ip_address,
        'user_agent', s.user_agent, 'created_at', s.created_at AT TIME ZONE 'UTC'
    )
    FROM sessions s
    WHERE s.user_id = $1
    UNION ALL
    SELECT 'accounts', a.created_at, a.id, jsonb_build_object(
        'id', a.id, 'user_id', a.user_id, 'provider', a.provider, 'provider_account_id', a.provider_account_id,
        'expires_at', a.expires_at AT TIME ZONE 'UTC', 'created_at', a.created_at AT TIME ZONE 'UTC'
    )
    FROM accounts a
    WHERE a.user_id = $1
    UNION ALL
    SELECT 'subscriptions', b.created_at, b.id, jsonb_build_object(
        'id', b.id, 'user_id', b.user_id, 'plan', b.plan, 'status', b.status, 'dodo_customer_id', b.dodo_customer_id,
        'dodo_subscription_id', b.dodo_subscription_id,
        'current_period_end', b.current_period_end AT TIME ZONE 'UTC', 'created_at', b.created_at AT TIME ZONE 'UTC',
        'updated_at', b.updated_at AT TIME ZONE 'UTC'
    )
    FROM subscriptions b
    WHERE b.user_id = $1
    UNION ALL
    SELECT 'usage', c.created_at, c.id, jsonb_build_object(
        'id', c.id, 'user_id', c.user_id, 'tokens_used', c.tokens_used, 'model', c.model,
        'created_at', c.created_at AT TIME ZONE 'UTC'
    )
    FROM usage c
    WHERE c.user_id = $1
) rows
ORDER BY at, id;
